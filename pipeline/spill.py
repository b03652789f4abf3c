"""Spill-over: how many jobs of a batch must go to priced endpoints so that it ends in time (docs/decisions/0032).

The rule is one inequality. Own engines that finish `own_rate` jobs a second will do `own_rate * time_left` of what
remains; only the difference is sent away, and what is away already counts. Each look begins anew from what is done, so
it stops by itself when own engines catch up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pipeline.rates import Rates, margin_s
from runtime.logs import get_logger
from store.database import Session
from store.spill import set_spill, spilling_batches

log = get_logger(__name__)


def spill_jobs(remaining: int, *, own_rate: float, time_left_s: float, out: int) -> int:
    """How many more jobs may begin on priced endpoints: those that own engines will not have done in time.

    `remaining` jobs have no result yet; `out` of them are on priced endpoints now.
    """
    too_many = math.ceil(remaining - own_rate * max(0.0, time_left_s))
    return max(0, too_many - out)


class SpillWatch:
    """What the dispatch leader remembers of batches that may spill: how fast own engines were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = Rates(clock)

    def sweep(self, session: Session) -> None:
        """Say of each batch that may spill how many of its jobs may go."""
        live = spilling_batches(session)
        self._rates.keep([batch.id for batch in live])
        for batch in live:
            rate = self._rates.look(
                batch.id,
                done=batch.done_by_own,
                is_running=batch.is_running,
                time_left_s=batch.time_left_s,
                window_s=batch.window_s,
            )
            time_left_s = batch.time_left_s - margin_s(batch.window_s)
            jobs = 0
            if rate is not None:
                jobs = spill_jobs(batch.remaining, own_rate=rate, time_left_s=time_left_s, out=batch.out)
            if jobs != batch.spill:
                set_spill(session, batch, jobs)
                log.info("batch_spills", batch_id=str(batch.id), jobs=jobs, own_rate=rate and round(rate, 3))
