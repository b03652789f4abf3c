"""Ending the batches whose last shard is closed, without holding up the dispatch of others.

A batch ends once its results have been counted. Those of a large one are counted over several calls: nobody writes to a
batch that is finalizing, so the parts add up. Who leads next begins the count anew.
"""

from __future__ import annotations

import time
from typing import Final
from uuid import UUID

from pipeline.traced import trace_end
from runtime.logs import get_logger
from store.batches import batches_to_finish, count_results, finish
from store.database import Database

log = get_logger(__name__)

COUNTED_AT_ONCE: Final = 100_000  # results in a statement; 20 to 50 ms, and up to 140 beside much other work
COUNT_S: Final = 0.2  # counting in one call, beyond one statement for each batch


class Finisher:
    """The leader's; it remembers how far it has counted."""

    def __init__(self, database: Database, *, counted_at_once: int = COUNTED_AT_ONCE, count_s: float = COUNT_S) -> None:
        self._database = database
        self._counted_at_once = counted_at_once
        self._count_s = count_s
        self._counted: dict[UUID, tuple[int, int]] = {}  # (seqs looked at, results found) of each batch

    def finish_some(self) -> bool:
        """End the batches that are counted; whether some have more to count."""
        with self._database.transaction() as session:
            ready = batches_to_finish(session)
        self._counted = {batch_id: self._counted.get(batch_id, (0, 0)) for batch_id in ready}
        until = time.monotonic() + self._count_s
        for batch_id in ready:
            if self._is_counted(batch_id, until=until):
                self._end(batch_id, results=self._counted.pop(batch_id)[1])
        return bool(self._counted)

    def _is_counted(self, batch_id: UUID, *, until: float) -> bool:
        while True:
            first, found = self._counted[batch_id]
            with self._database.transaction() as session:
                count, total = count_results(session, batch_id, first=first, limit=self._counted_at_once)
            first, found = first + self._counted_at_once, found + count
            self._counted[batch_id] = first, found
            if first >= total or time.monotonic() >= until:
                return first >= total

    def _end(self, batch_id: UUID, *, results: int) -> None:
        with self._database.transaction() as session:
            missing = finish(session, batch_id, results=results)
        if missing:
            log.error("results_missing", batch_id=str(batch_id), jobs=missing)
        else:
            log.info("batch_ended", batch_id=str(batch_id))
            trace_end(self._database, batch_id)
