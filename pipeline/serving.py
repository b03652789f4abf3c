"""Who serves at this moment, and what: the same answer for a file from the command line and for one over HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from models.states import Trust
from runtime.errors import BadInput, ServiceUnreachable
from runtime.logs import get_logger
from store.presence import PresenceBoard, WorkerPresence

log = get_logger(__name__)

EXTERNAL_REMEDY = "to send prompts there, submit with --trust external and, as they bill tokens, --budget-money N"


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What jobs may name as their model: on machines of ours, and at external endpoints."""

    own: frozenset[str]
    external: frozenset[str] = frozenset()

    def allowed(self, trust: Trust) -> frozenset[str]:
        """What jobs of a batch of this trust may name."""
        return self.own if trust is Trust.OWN else self.own | self.external

    def trusts(self) -> dict[str, Trust]:
        """Each, and the trust that a batch must have to name it."""
        return dict.fromkeys(self.external, Trust.EXTERNAL) | dict.fromkeys(self.own, Trust.OWN)


def live_workers(board: PresenceBoard) -> list[WorkerPresence]:
    """The live workers; none while Redis is away: models are checked when a worker runs the jobs."""
    try:
        return board.workers()
    except ServiceUnreachable as error:
        log.warning("presence_unknown", error=str(error))
        return []


def served_models(workers: Sequence[WorkerPresence]) -> ServedModels | None:
    """The models that jobs may name; None without a worker: nothing is known.

    One queue feeds all workers: only what every one of them serves is sure to be answered.
    """
    if not workers:
        return None
    own = _of_all(worker.models for worker in workers)
    every = _of_all([*worker.models, *worker.external_models] for worker in workers)
    return ServedModels(own, every - own)


def only_served(served: frozenset[str] | None) -> str:
    """The one model that is served. Raises BadInput if it is not just one, or not known."""
    if served is None or len(served) != 1:
        known = f"; the workers serve {', '.join(sorted(served))}" if served else ", as no worker is live to tell"
        raise BadInput(f"say which model with --model{known}")
    [name] = served
    return name


def _of_all(names: Iterable[Sequence[str]]) -> frozenset[str]:
    return frozenset.intersection(*map(frozenset, names))
