"""What the process that leads dispatch states of all batches, as metrics; one that leads no more states nothing.

It must not decide anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from models.states import BatchState
from pipeline.deadlines import DeadlineWatch
from runtime.metrics import (
    AT_RISK,
    BATCHES,
    HINTS_READY,
    HINTS_RESENT,
    JOBS_LEFT,
    LEADER,
    LEASES_RECOVERED,
    PAUSED,
    SLACK,
    WINDOW,
    WORKERS,
    is_counting,
)
from store.database import Database
from store.deadlines import live_counts
from store.presence import WorkerPresence

_NODES: Final = ("generation", "documents", "control", "express")
_LIVE = (BatchState.VALIDATING, BatchState.IN_PROGRESS, BatchState.CANCELLING, BatchState.FINALIZING)


class Leading:
    """The leader's figures; a process that never led has none."""

    def __init__(self) -> None:
        self._leads = False
        self._deadlines = DeadlineWatch()

    def begin(self) -> None:
        """It leads."""
        if not self._leads:
            self._leads = True
            LEADER.set(1)
            for counter in (HINTS_RESENT, LEASES_RECOVERED):  # a rate needs a number to begin from
                counter.add(0)

    def end(self) -> None:
        """It does not lead, or may not: what it stated last is another's to state."""
        if not self._leads:
            return
        self._leads = False
        self._deadlines = DeadlineWatch()  # what it remembers is old by the time that it leads again
        for state in _LIVE:
            BATCHES.set(0, state=state)
        for node in _NODES:
            WORKERS.set(0, node=node)
        for gauge in (LEADER, JOBS_LEFT, AT_RISK, PAUSED, WINDOW, HINTS_READY):
            gauge.set(0)
        SLACK.set(math.nan)

    def see(self, workers: Sequence[WorkerPresence]) -> None:
        """Which workers live."""
        live = Counter(worker.node for worker in workers if worker.healthy)
        for node in _NODES:
            WORKERS.set(live[node], node=node)

    def state(self, database: Database, *, window: int) -> None:
        """Once a second: whether batches will be done in time, and for who counts how many there are."""
        found = self._deadlines.look(database)
        if not is_counting():
            return
        with database.transaction() as session:
            counts = live_counts(session)
        for state in _LIVE:
            BATCHES.set(counts.get(state, (0, 0))[0], state=state)
        PAUSED.set(sum(paused for _, paused in counts.values()))
        JOBS_LEFT.set(found.unfinished)
        AT_RISK.set(found.at_risk)
        SLACK.set(math.nan if found.least_slack_s is None else found.least_slack_s)
        WINDOW.set(window)
