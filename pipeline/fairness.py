"""Who goes next: classes first, then a weighted fair share of tokens among tenants, and among a tenant's batches.

Pure arithmetic over what the leader read; it knows no database. Its credits are the leader's memory alone: a new
leader begins without them, which costs nobody more than one shard.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from models.states import Priority
from store.dispatching import Candidates

QUANTUM_TOKENS = (
    1  # credit of weight 1 a round; the finest share, since rounds without a payer are skipped by arithmetic
)

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Flow(Generic[Key]):
    """One that waits to be served: its weight, and the cost of what it would send next, in tokens."""

    key: Key
    weight: float
    cost: int


class DeficitRoundRobin(Generic[Key]):
    """Weighted deficit round robin: who is served next, so that tokens are shared by weight.

    Shreedhar and Varghese, "Efficient Fair Queueing Using Deficit Round Robin", SIGCOMM 1995: each round adds
    weight * QUANTUM_TOKENS of credit to every flow that waits; one whose credit covers its next cost is served and
    pays. Rounds in which nobody can pay are skipped at once. A flow that was absent is served once before the
    others, as the new flows of FQ-CoDel (RFC 8290, section 4.2), and pays for it in the same way: from its second
    shard on it has what the others have. Between two flows that wait all the time, served tokens divided by weight
    differ by at most QUANTUM_TOKENS plus the largest cost divided by weight of each.
    """

    def __init__(self) -> None:
        self._credits: dict[Key, float] = {}

    def forget_others(self, present: Iterable[Key]) -> None:
        """Drop the credit of flows that have left: it cannot be saved up."""
        keep = set(present)
        self._credits = {key: credit for key, credit in self._credits.items() if key in keep}

    def next(self, flows: Sequence[Flow[Key]]) -> Key:
        """The flow to serve; among equals a new one, then the first of the sequence. Changes nothing."""
        at = min(range(len(flows)), key=lambda at: (self._rounds(flows[at]), flows[at].key in self._credits, at))
        return flows[at].key

    def serve(self, flows: Sequence[Flow[Key]], key: Key) -> None:
        """Let the rounds pass until this flow can pay, and let it pay."""
        served = next(flow for flow in flows if flow.key == key)
        rounds = self._rounds(served)
        for flow in flows:
            if flow.key in self._credits:
                self._credits[flow.key] += rounds * flow.weight * QUANTUM_TOKENS
        self._credits[key] = self._credits.get(key, served.cost) - served.cost

    def _rounds(self, flow: Flow[Key]) -> int:
        missing = flow.cost - self._credits.get(flow.key, flow.cost)
        return max(0, math.ceil(missing / (flow.weight * QUANTUM_TOKENS) - 1e-9))


class FairShare:
    """Chooses the shards that go out next. A class is served only while no higher one has a shard to send.

    Within a class tenants share by `tenant_weights` (1 unless stated), a tenant's batches by their own weights, in
    estimated tokens; in each round the batch that must end first goes first.
    """

    def __init__(self, tenant_weights: Mapping[str, float]) -> None:
        self._weights = tenant_weights
        self._tenants: dict[Priority, DeficitRoundRobin[str]] = {priority: DeficitRoundRobin() for priority in Priority}
        self._batches: dict[tuple[Priority, str], DeficitRoundRobin[UUID]] = {}

    def choose(self, batches: Sequence[Candidates], *, places: int) -> list[int]:
        """Up to `places` shards in the order in which they should be claimed; `batches` by deadline."""
        chosen: list[int] = []
        for priority in Priority:
            of_class = [batch for batch in batches if batch.priority is priority]
            chosen += self._choose_in_class(priority, of_class, places=places - len(chosen))
        return chosen

    def _choose_in_class(self, priority: Priority, batches: list[Candidates], *, places: int) -> list[int]:
        tenants = self._tenants[priority]
        tenants.forget_others(batch.tenant for batch in batches)
        waiting: dict[str, dict[UUID, _Waiting]] = {}
        for batch in batches:
            if batch.shards:
                waiting.setdefault(batch.tenant, {})[batch.batch_id] = _Waiting(batch.weight, deque(batch.shards))
        for tenant in waiting:
            present = [batch.batch_id for batch in batches if batch.tenant == tenant]
            self._of(priority, tenant).forget_others(present)
        chosen: list[int] = []
        while waiting and len(chosen) < places:
            heads = {tenant: self._head(priority, tenant, its) for tenant, its in waiting.items()}
            flows = [Flow(tenant, self._weights.get(tenant, 1.0), cost) for tenant, (_, cost) in heads.items()]
            tenant = tenants.next(flows)
            tenants.serve(flows, tenant)
            chosen.append(self._take(priority, tenant, waiting))
        return chosen

    def _of(self, priority: Priority, tenant: str) -> DeficitRoundRobin[UUID]:
        return self._batches.setdefault((priority, tenant), DeficitRoundRobin())

    def _head(self, priority: Priority, tenant: str, batches: dict[UUID, _Waiting]) -> tuple[UUID, int]:
        """The batch that this tenant would send from, and what that costs."""
        batch_id = self._of(priority, tenant).next(_flows(batches))
        return batch_id, batches[batch_id].cost

    def _take(self, priority: Priority, tenant: str, waiting: dict[str, dict[UUID, _Waiting]]) -> int:
        """The tenant's next shard, paid for among its batches; what has nothing left stops waiting."""
        batches = waiting[tenant]
        flows = _flows(batches)
        batch_id = self._of(priority, tenant).next(flows)
        self._of(priority, tenant).serve(flows, batch_id)
        shard_id, _ = batches[batch_id].shards.popleft()
        if not batches[batch_id].shards:
            del batches[batch_id]
        if not batches:
            del waiting[tenant]
        return shard_id


def to_recall(batches: Sequence[Candidates]) -> list[int]:
    """Dispatched shards that nobody has claimed and that should let others go first.

    They are those of a lower class than one that waits, and, when a tenant comes that has nothing out yet, those of
    tenants that have shards running: so a newcomer waits for one free place, not for the whole window.
    """
    running = {batch.tenant for batch in batches if batch.running}
    live = running | {batch.tenant for batch in batches if batch.unclaimed}
    ranks = {priority: rank for rank, priority in enumerate(Priority)}
    highest = _least(ranks[batch.priority] for batch in batches if batch.shards)
    newest = _least(ranks[batch.priority] for batch in batches if batch.shards and batch.tenant not in live)

    def gives_way(batch: Candidates) -> bool:
        rank = ranks[batch.priority]
        return rank > highest or (batch.tenant in running and rank >= newest)

    return [shard_id for batch in batches if batch.unclaimed and gives_way(batch) for shard_id in batch.unclaimed]


@dataclass(slots=True)
class _Waiting:
    weight: float
    shards: deque[tuple[int, int]]

    @property
    def cost(self) -> int:
        return max(1, self.shards[0][1])


def _flows(batches: dict[UUID, _Waiting]) -> list[Flow[UUID]]:
    return [Flow(batch_id, waiting.weight, waiting.cost) for batch_id, waiting in batches.items()]


def _least(ranks: Iterable[int]) -> float:
    return min(ranks, default=math.inf)
