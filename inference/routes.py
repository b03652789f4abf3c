"""An endpoint as the router of one process sees it: what it may be sent, what is under way on it, how it fares."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from inference.breaker import Breaker
from inference.concurrency import Window
from inference.endpoint import Endpoint
from models.endpoints import EndpointSpec
from models.states import Trust

MOST_AT_ONCE: Final = 256  # of one child on an endpoint that states no concurrency
AT_HAND: Final = 4  # jobs that wait to be paid for
PAUSE_BASE_S, PAUSE_CAP_S = 0.5, 60.0  # of an endpoint that says it has had too many requests, doubled each time
PROBE_EVERY_S: Final = 1.0  # of one that is down: a look costs it next to nothing
CLOSED_S: Final = 300.0  # chosen: how long an endpoint rests whose quota is spent, or that refuses our key


@dataclass(slots=True, eq=False)
class Route:
    """`spec` is None for the worker's own engine, which has `places` and takes every model that it serves."""

    endpoint: Endpoint
    spec: EndpointSpec | None = None
    engine_id: int | None = None
    places: int = 0
    held_back: Callable[[], int] = lambda: 0
    """How many of its places are to stay empty now, for single requests."""
    serves: str = "generation"
    is_down: bool = False
    """The engine refused a connection, or broke one, and has not been seen healthy since."""
    models: frozenset[str] | None = None
    """What the engine serves, once it has said so."""
    models_until: float = 0.0
    running: int = 0
    outstanding_tokens: int = 0
    not_before: float = 0.0
    closed_for: str = ""
    breaker: Breaker = field(default_factory=Breaker)
    window: Window = field(default_factory=Window)
    door: asyncio.Lock = field(default_factory=asyncio.Lock)
    _pauses: int = 0

    @classmethod
    def of(cls, spec: EndpointSpec, endpoint: Endpoint, *, engine_id: int, sharers: int = 1) -> Route:
        """The route of a registered endpoint; its window finds out how many requests at once it bears.

        `sharers`: so many children like this one send to it.
        """
        most = min(spec.concurrency or MOST_AT_ONCE, MOST_AT_ONCE)
        return cls(endpoint, spec, engine_id, serves=spec.serves, window=Window(most=most, sharers=sharers))

    @property
    def name(self) -> str:
        """What people call it."""
        return "engine" if self.spec is None else self.spec.name

    @property
    def weight(self) -> float:
        """Its share among those that are alike."""
        return 1.0 if self.spec is None else self.spec.weight

    @property
    def is_own(self) -> bool:
        """Whether it runs on machines of ours."""
        return self.spec is None or self.spec.trust is Trust.OWN

    @property
    def is_priced(self) -> bool:
        """Whether its answers are billed by the token."""
        return self.spec is not None and self.spec.is_priced

    @property
    def size(self) -> int:
        """Requests at once that it is given now."""
        return self.places - self.held_back() if self.spec is None else self.window.size

    @property
    def wanted(self) -> int:
        """Jobs to have at hand for it: for one that bills tokens only a few more than may be paid for, as it seems."""
        if self.closed_for:
            return 0
        return min(self.size, self.running + AT_HAND) if self.is_priced else self.size

    def is_ready(self, now: float) -> bool:
        """Whether one more request may go to it now."""
        if now < self.not_before or self.running >= self.size:
            return False
        return not self.is_broken(now) or (not self.running and (self.is_down or self.breaker.may_probe(now)))

    def is_broken(self, now: float) -> bool:
        """Whether it is closed, or has failed so often that it must show first that it is healthy."""
        return self.is_down or self.breaker.is_open(now) or self.is_closed(now)

    def is_closed(self, now: float) -> bool:
        """Whether it takes nothing of ours at all, for a while."""
        return bool(self.closed_for) and now < self.not_before

    def may_serve(self, model: str) -> bool:
        """Whether the engine serves this model, as far as is known."""
        return self.models is None or model in self.models

    def ready_at(self, now: float) -> float | None:
        """When it may be ready by the clock alone; None: when something of it ends."""
        moments = [moment for moment in (self.not_before, self.breaker.retry_at) if moment > now]
        return max(moments, default=None)

    def load(self, tokens: int) -> float:
        """Tokens outstanding on it, with so many more, by its weight."""
        return (self.outstanding_tokens + tokens) / self.weight

    def begin(self, tokens: int) -> None:
        """One more request is on its way."""
        self.running += 1
        self.outstanding_tokens += tokens

    def end(self, tokens: int) -> None:
        """It is no longer."""
        self.running -= 1
        self.outstanding_tokens -= tokens

    def throttled(self, now: float, retry_after_s: float | None) -> float:
        """It has had too many: how long it rests, by exponential backoff with full jitter, at least as it wishes.

        0.0 where it rests already: many were under way.
        """
        self.window.overloaded()
        if now < self.not_before:
            return 0.0
        self._pauses += 1
        wait_s = random.uniform(0, min(PAUSE_CAP_S, PAUSE_BASE_S * 2**self._pauses))  # noqa: S311  # jitter
        wait_s = max(wait_s, retry_after_s or 0.0)
        self.not_before = now + wait_s
        return wait_s

    def unhealthy(self, now: float) -> None:
        """It was asked whether it is healthy, and is not: when it is asked again."""
        self.not_before = now + random.uniform(0.5, 1.5) * PROBE_EVERY_S  # noqa: S311  # jitter

    def close(self, now: float, reason: str, retry_after_s: float | None) -> None:
        """It takes nothing of ours, whatever we send: its quota is spent, or it refuses our key."""
        self.closed_for = reason
        self.not_before = now + max(CLOSED_S, retry_after_s or 0.0)

    def answered(self) -> None:
        """It has answered: what was against it is over."""
        self.closed_for = ""
        self._pauses = 0
        self.breaker.succeeded()
