"""The parts that one gateway process has, opened once and shared by its requests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from fastapi import Request

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
    estimating: threading.Lock = field(default_factory=threading.Lock)
    """One at a time: it takes a core."""


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway
