"""A circuit breaker: an endpoint that keeps failing rests, and shows with one request that it is there again.

It must not look at errors: its caller says what a failure is. An answer that blames the request is none, nor is a 429.
After M. Nygard, "Release It!" (2007); the waits are exponential with full jitter (M. Brooker, AWS Architecture Blog,
"Exponential Backoff and Jitter", 2015), so that the children of many workers do not come back at the same moment.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Final

# Chosen: one that fails a fifth of its requests does so five times in a row once in 3,100, and is kept.
FAILURES_IN_A_ROW: Final = 5
JUDGED: Final = 20  # so many outcomes are looked at, of which more than half may not be failures
BASE_S, CAP_S = 0.5, 60.0  # the first wait's bound, doubled with each further one up to the last


class Breaker:
    """Closed, open, half-open: moments are seconds of one monotonic clock, given by the caller.

    Open, it lets nothing through until `retry_at`; then it is half-open: `may_probe`, and the caller sends one
    request. A success closes it, a failure opens it for longer.
    """

    def __init__(self, *, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self.retry_at = 0.0
        self._is_open = False
        self._openings = 0
        self._in_a_row = 0
        self._outcomes: deque[bool] = deque(maxlen=JUDGED)
        self._uniform = uniform

    def is_open(self, now: float) -> bool:
        """Whether it has failed so often that it must show first that it is there; half-open is open."""
        return self._is_open

    def may_probe(self, now: float) -> bool:
        """Whether it has rested long enough for one request, which shall show that it is there."""
        return self._is_open and now >= self.retry_at

    def succeeded(self) -> None:
        """A request was answered."""
        self._in_a_row = 0
        if self._is_open:
            self._is_open = False
            self._openings = 0
            self._outcomes.clear()  # what was before the rest says nothing of what came back
        self._outcomes.append(True)

    def failed(self, now: float, retry_after_s: float | None = None) -> None:
        """A request has failed. It rests at least for `retry_after_s`, if it is open or opens.

        Failures of requests that were under way when it opened do not make it rest longer.
        """
        if self._is_open and now < self.retry_at:
            self.retry_at = max(self.retry_at, now + (retry_after_s or 0.0))
            return
        self._in_a_row += 1
        self._outcomes.append(False)
        if self._is_open or self._in_a_row >= FAILURES_IN_A_ROW or self._fails_mostly():
            self._open(now, retry_after_s or 0.0)

    def _fails_mostly(self) -> bool:
        return len(self._outcomes) == JUDGED and 2 * self._outcomes.count(False) > JUDGED

    def _open(self, now: float, least_s: float) -> None:
        bound_s = min(CAP_S, BASE_S * 2 ** min(self._openings, 30))
        self._is_open = True
        self._openings += 1
        self.retry_at = now + max(least_s, self._uniform(0.0, bound_s))
