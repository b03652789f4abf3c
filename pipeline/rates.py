"""How fast batches go: jobs a second over the last minute, measured only while they run.

What a batch waits behind others, or for an engine to load, says nothing of how fast it goes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Final
from uuid import UUID

WINDOW_S: Final = 60.0  # chosen: over so long a rate is measured; an outage of an engine that is shorter moves nothing
LEAST_S, LEAST_JOBS = 5.0, 20  # of what is measured, until a rate is believed
LATE_SHARE: Final = 0.25  # chosen: of the window; so long engines that do nothing may come back
# Chosen: of what is left of its time, a part is for the last jobs and for what goes wrong.
MARGIN_SHARE, MOST_MARGIN_S = 0.05, 60.0


def margin_s(window_s: float) -> float:
    """How much sooner than at its end a batch with such a window should be done."""
    return min(MOST_MARGIN_S, MARGIN_SHARE * window_s)


class Rates:
    """The rates of some batches; they are remembered while a batch waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[UUID, deque[tuple[float, int]]] = {}
        self._rates: dict[UUID, float] = {}

    def keep(self, batches: Collection[UUID]) -> None:
        """Forget all but these."""
        self._seen = {batch: self._seen.get(batch, deque()) for batch in batches}
        self._rates = {batch: rate for batch, rate in self._rates.items() if batch in self._seen}

    def look(self, batch: UUID, *, done: int, is_running: bool, time_left_s: float, window_s: float) -> float | None:
        """Jobs a second that are finished of a batch while it runs; None while too little is known.

        `done` so far. Where nothing is known, or engines are silent, they are given up only when most of the window is
        over: then 0.
        """
        now, seen = self._clock(), self._seen.setdefault(batch, deque())
        is_late = time_left_s <= LATE_SHARE * window_s
        if not is_running:
            seen.clear()
        else:
            seen.append((now, done))
            while len(seen) > 2 and seen[1][0] <= now - WINDOW_S:
                seen.popleft()
            seconds, jobs = now - seen[0][0], done - seen[0][1]
            is_known = seconds >= WINDOW_S or (seconds >= LEAST_S and jobs >= LEAST_JOBS)
            if is_known and (jobs or is_late):
                self._rates[batch] = jobs / seconds
        return self._rates.get(batch, 0.0 if is_late else None)
