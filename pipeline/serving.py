"""Who serves at this moment, and what: the same answer for a file from the command line and for one over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from store.presence import PresenceBoard, WorkerPresence

log = get_logger(__name__)


def live_workers(board: PresenceBoard) -> list[WorkerPresence]:
    """The live workers; none while Redis is away: models are checked when a worker runs the jobs."""
    try:
        return board.workers()
    except ServiceUnreachable as error:
        log.warning("presence_unknown", error=str(error))
        return []


def served_models(workers: Sequence[WorkerPresence]) -> frozenset[str] | None:
    """The models that jobs may name; None without a worker: nothing is known.

    One queue feeds all workers: only what every one of them serves is sure to be answered.
    """
    return frozenset.intersection(*(frozenset(worker.models) for worker in workers)) if workers else None
