"""The parts that one gateway process has, opened once and shared by its requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request

from api.errors import ApiError
from api.uploads import UploadSlots
from runtime.settings import Settings
from store.blobs import Blobs
from store.database import Database
from store.presence import PresenceBoard
from store.rate_limits import RateLimits


@dataclass(frozen=True, slots=True)
class Gateway:
    """What routes need; threads share it."""

    settings: Settings
    database: Database
    blobs: Blobs
    limits: RateLimits
    board: PresenceBoard
    upload_slots: UploadSlots
    invite: Callable[[], None] | None = None
    """Lets the express node know that single requests wait, without waiting itself; None where no broker is named."""
    estimates: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """The right to read a whole file, which takes a core: one request has it at a time. Raises ApiError 429."""
        if not self.estimates.acquire(blocking=False):
            raise ApiError(
                429,
                "another file is being estimated; try again soon",
                kind="rate_limit_error",
                headers={"Retry-After": "5"},
            )
        try:
            yield
        finally:
            self.estimates.release()


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway
