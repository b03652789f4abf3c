"""Ending the batches whose last shard is closed, without holding up the dispatch of others.

A batch ends once its results have been counted. Those of a large one are counted over several calls: nobody writes to a
batch that is finalizing, so the parts add up. Who leads next begins the count anew.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final
from uuid import UUID

from pipeline.traced import trace_end
from runtime.logs import get_logger
from store.batches import batches_to_finish, count_results, finish
from store.database import Database

log = get_logger(__name__)

COUNTED_AT_ONCE: Final = 100_000  # results in a statement; 20 to 50 ms, and up to 140 beside much other work
COUNT_S: Final = 0.2  # in one call, beyond one statement


class Finisher:
    """The leader's; it remembers how far it has counted."""

    def __init__(self, database: Database, *, counted_at_once: int = COUNTED_AT_ONCE, count_s: float = COUNT_S) -> None:
        self._database = database
        self._counted_at_once = counted_at_once
        self._count_s = count_s
        # (seqs looked at, results found) of each batch; who had a turn last is last.
        self._counted: dict[UUID, tuple[int, int]] = {}
        self._large_first = False

    def forget(self) -> None:
        """Count anew, as another may lead meanwhile."""
        self._counted.clear()

    def finish_some(self) -> bool:
        """End batches that are counted; whether there is more to count.

        Batches of one statement and larger ones come first by turns, so that neither waits long for many of the others.
        """
        with self._database.transaction() as session:
            totals = batches_to_finish(session)
        counted = {batch_id: parts for batch_id, parts in self._counted.items() if batch_id in totals}
        self._counted = counted | {batch_id: (0, 0) for batch_id in totals if batch_id not in counted}
        turns = deque(sorted(self._counted, key=lambda one: (totals[one] > self._counted_at_once) != self._large_first))
        self._large_first = not self._large_first
        until = time.monotonic() + self._count_s
        while turns:
            batch_id = turns.popleft()
            if self._counts_on(batch_id, totals[batch_id]):
                turns.append(batch_id)
            if time.monotonic() >= until:
                break
        return bool(turns)

    def _counts_on(self, batch_id: UUID, total: int) -> bool:
        """Count a part of its results, and end it after the last; whether a part is left."""
        first, found = self._counted.pop(batch_id)
        if first < total:
            with self._database.transaction() as session:
                found += count_results(session, batch_id, first=first, limit=self._counted_at_once)
            first += self._counted_at_once
        if first < total or not self._ends(batch_id, results=found):
            self._counted[batch_id] = first, found
        return first < total

    def _ends(self, batch_id: UUID, *, results: int) -> bool:
        """Whether it has ended or goes on; not while another transaction holds it."""
        with self._database.transaction() as session:
            missing = finish(session, batch_id, results=results)
        if missing:
            log.error("results_missing", batch_id=str(batch_id), jobs=missing)
        elif missing is not None:
            log.info("batch_ended", batch_id=str(batch_id))
            trace_end(self._database, batch_id)
        return missing is not None
