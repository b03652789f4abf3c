"""Who serves at this moment, and what: the same answer for a file from the command line and for one over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import BadInput, ServiceUnreachable
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


def only_served(served: frozenset[str] | None) -> str:
    """The one model that is served. Raises BadInput if it is not just one, or not known."""
    if served is None or len(served) != 1:
        known = f"; the workers serve {', '.join(sorted(served))}" if served else ", as no worker is live to tell"
        raise BadInput(f"say which model with --model{known}")
    [name] = served
    return name
