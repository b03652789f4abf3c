"""Whether batches will be done in their windows, at the pace of the last minute; a word in the log when one will not.

The rule: a batch that has `remaining` jobs to run at `rate` a second needs remaining / rate; what it has left of its
window less that is its slack. The leader alone looks, and what it remembers, another one has again within a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pipeline.rates import Rates, margin_s
from runtime.logs import get_logger
from store.database import Database
from store.deadlines import RunningBatch, running_batches

log = get_logger(__name__)

HOLD_S: Final = 10.0  # chosen: a batch must be short of time for so long; paces jump at the beginning
SHARE: Final = 0.02  # of the leader's time at most: a look sums up all shards of large batches
MOST_REST_S: Final = 30.0


def slack_s(remaining: int, *, rate: float, time_left_s: float, window_s: float) -> float:
    """Time left less time needed; negative by no more than a whole window, as nothing is known of a rate of 0."""
    needed_s = 0.0 if not remaining else remaining / rate if rate else float("inf")
    return max(time_left_s - needed_s, -window_s)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """What a look showed; `unfinished` leaves paused batches out, `least_slack_s` is None while no pace is known."""

    unfinished: int = 0
    at_risk: int = 0
    least_slack_s: float | None = None


class DeadlineWatch:
    """Looks at all batches in progress, and remembers which of them are at risk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates = Rates(clock)
        self._short_since: dict[UUID, float] = {}
        self._at_risk: set[UUID] = set()
        self._look_at = 0.0
        self._last = Deadlines()

    def look(self, database: Database) -> Deadlines:
        """How things stand; of a moment ago, where a look takes long."""
        began = self._clock()
        if began < self._look_at:
            return self._last
        with database.transaction() as session:
            live = running_batches(session)
        self._last = self.judge(live)
        now = self._clock()
        self._look_at = now + min(MOST_REST_S, (now - began) / SHARE)
        return self._last

    def judge(self, live: Sequence[RunningBatch]) -> Deadlines:
        """How these batches stand, which are all in progress; tells the log of those that begin or cease to be late."""
        ids = {batch.id for batch in live}
        self._rates.keep(ids)
        self._at_risk &= ids
        self._short_since = {batch: since for batch, since in self._short_since.items() if batch in ids}
        slacks = [slack for batch in live if (slack := self._slack(batch)) is not None]
        return Deadlines(
            unfinished=sum(batch.unfinished for batch in live if not batch.is_paused),
            at_risk=len(self._at_risk),
            least_slack_s=min(slacks, default=None),
        )

    def _slack(self, batch: RunningBatch) -> float | None:
        if batch.time_left_s is None:
            return None
        rate = self._rates.look(
            batch.id,
            done=batch.done,
            is_running=batch.is_running,
            time_left_s=batch.time_left_s,
            window_s=batch.window_s,
        )
        if rate is None:
            return None
        slack = slack_s(batch.remaining, rate=rate, time_left_s=batch.time_left_s, window_s=batch.window_s)
        if slack < 0:
            self._is_short(batch, rate, slack)
        else:
            self._has_time(batch, slack)
        return slack

    def _is_short(self, batch: RunningBatch, rate: float, slack: float) -> None:
        since = self._short_since.setdefault(batch.id, self._clock())
        if batch.id in self._at_risk or self._clock() - since < HOLD_S:
            return
        self._at_risk.add(batch.id)
        log.warning(
            "deadline_at_risk",
            batch_id=str(batch.id),
            seconds_short=round(-slack),
            jobs_left=batch.remaining,
            jobs_a_second=round(rate, 3),
        )

    def _has_time(self, batch: RunningBatch, slack: float) -> None:
        self._short_since.pop(batch.id, None)
        if batch.id in self._at_risk and slack >= margin_s(batch.window_s):
            self._at_risk.discard(batch.id)
            log.info("deadline_recovered", batch_id=str(batch.id), seconds_left=round(slack))
