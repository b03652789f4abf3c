"""Spill-over: how many jobs of a batch must go to priced endpoints so that it ends in time (docs/decisions/0032).

The rule is one inequality. Own engines that finish `own_rate` jobs a second will do `own_rate * time_left` of what
remains; only the difference is sent away, and what is away already counts. Each look begins anew from what is done, so
it stops by itself when own engines catch up.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final
from uuid import UUID

from runtime.logs import get_logger
from store.database import Session
from store.spill import Spilling, set_spill, spilling_batches

log = get_logger(__name__)

WINDOW_S: Final = 60.0  # chosen: over so long a rate is measured; an outage of an engine that is shorter moves nothing
LEAST_S, LEAST_JOBS = 5.0, 20  # of what is measured, until a rate is believed
LATE_SHARE: Final = 0.25  # chosen: of the window; so long engines that do nothing may come back
# Chosen: of what is left of its time, a part is for the last jobs and for what goes wrong.
MARGIN_SHARE, MOST_MARGIN_S = 0.05, 60.0


def spill_jobs(remaining: int, *, own_rate: float, time_left_s: float, out: int) -> int:
    """How many more jobs may begin on priced endpoints: those that own engines will not have done in time.

    `remaining` jobs have no result yet; `out` of them are on priced endpoints now.
    """
    too_many = math.ceil(remaining - own_rate * max(0.0, time_left_s))
    return max(0, too_many - out)


class SpillWatch:
    """What the dispatch leader remembers of batches that may spill: how fast own engines were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[UUID, deque[tuple[float, int]]] = {}
        self._rates: dict[UUID, float] = {}

    def sweep(self, session: Session) -> None:
        """Say of each batch that may spill how many of its jobs may go."""
        live = spilling_batches(session)
        self._seen = {batch.id: self._seen.get(batch.id, deque()) for batch in live}
        self._rates = {batch.id: self._rates[batch.id] for batch in live if batch.id in self._rates}
        for batch in live:
            rate = self._own_rate(batch)
            time_left_s = batch.time_left_s - min(MOST_MARGIN_S, MARGIN_SHARE * batch.window_s)
            jobs = 0
            if rate is not None:
                jobs = spill_jobs(batch.remaining, own_rate=rate, time_left_s=time_left_s, out=batch.out)
            if jobs != batch.spill:
                set_spill(session, batch, jobs)
                log.info("batch_spills", batch_id=str(batch.id), jobs=jobs, own_rate=rate and round(rate, 3))

    def _own_rate(self, batch: Spilling) -> float | None:
        """Jobs a second that own engines finish of it while it runs; None while too little is known.

        What it waits behind other batches, or for an engine to load, says nothing of that. Where nothing is known, or
        engines are silent, they are given up only when most of the window is over.
        """
        now, seen = self._clock(), self._seen[batch.id]
        is_late = batch.time_left_s <= LATE_SHARE * batch.window_s
        if not batch.is_running:
            seen.clear()
        else:
            seen.append((now, batch.done_by_own))
            while len(seen) > 2 and seen[1][0] <= now - WINDOW_S:
                seen.popleft()
            seconds, jobs = now - seen[0][0], batch.done_by_own - seen[0][1]
            is_known = seconds >= WINDOW_S or (seconds >= LEAST_S and jobs >= LEAST_JOBS)
            if is_known and (jobs or is_late):
                self._rates[batch.id] = jobs / seconds
        return self._rates.get(batch.id, 0.0 if is_late else None)
