"""Fair shares: what every order of tenants, weights, classes and costs must keep to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from models.states import Priority
from pipeline.fairness import QUANTUM_TOKENS, DeficitRoundRobin, FairShare, Flow, to_recall
from runtime.clock import uuid7
from store.dispatching import Candidates

WEIGHTS = st.sampled_from([0.5, 1.0, 2.0, 3.0])
COSTS = st.integers(1, 20_000)


def batch(
    tenant: str = "a",
    *,
    shards: tuple[tuple[int, int], ...] = (),
    priority: Priority = Priority.NORMAL,
    weight: float = 1.0,
    running: int = 0,
    unclaimed: tuple[int, ...] = (),
) -> Candidates:
    return Candidates(uuid7(), tenant, priority, weight, running, unclaimed, shards)


def numbered(first: int, count: int, cost: int = 1000) -> tuple[tuple[int, int], ...]:
    return tuple((number, cost) for number in range(first, first + count))


@given(
    st.lists(st.tuples(WEIGHTS, st.lists(COSTS, min_size=1, max_size=5)), min_size=2, max_size=6), st.integers(5, 200)
)
def test_flows_that_always_wait_get_tokens_by_weight_within_the_stated_bound(
    flows: list[tuple[float, list[int]]], servings: int
) -> None:
    robin: DeficitRoundRobin[int] = DeficitRoundRobin()
    served = [0] * len(flows)
    times = Counter[int]()
    for _ in range(servings):
        waiting = [Flow(key, weight, costs[times[key] % len(costs)]) for key, (weight, costs) in enumerate(flows)]
        key = robin.next(waiting)
        robin.serve(waiting, key)
        served[key] += waiting[key].cost
        times[key] += 1
        share = [(served[k] / weight, max(costs) / weight) for k, (weight, costs) in enumerate(flows)]
        for one, most_one in share:
            for other, most_other in share:
                assert one - other <= QUANTUM_TOKENS + most_one + most_other + 1e-6


@st.composite
def waiting_batches(draw: st.DrawFn) -> list[Candidates]:
    found = []
    for number in range(draw(st.integers(1, 7))):
        shards = tuple((number * 100 + at, cost) for at, cost in enumerate(draw(st.lists(COSTS, max_size=6))))
        found.append(
            batch(
                draw(st.sampled_from("abc")),
                shards=shards,
                priority=draw(st.sampled_from(Priority)),
                weight=draw(WEIGHTS),
                running=draw(st.integers(0, 3)),
            )
        )
    return found


@given(waiting_batches(), st.integers(1, 30))
def test_a_choice_fills_the_places_by_class_and_in_each_batchs_own_order(
    batches: list[Candidates], places: int
) -> None:
    chosen = FairShare({"a": 2.0}).choose(batches, places=places)
    assert len(chosen) == len(set(chosen)) == min(places, sum(len(one.shards) for one in batches))
    for one in batches:
        ids = [shard_id for shard_id, _ in one.shards]
        taken = [shard_id for shard_id in chosen if shard_id in ids]
        assert taken == ids[: len(taken)], "in their order, none left out"
    classes = {shard_id: list(Priority).index(one.priority) for one in batches for shard_id, _ in one.shards}
    assert [classes[shard_id] for shard_id in chosen] == sorted(classes[shard_id] for shard_id in chosen)


@given(st.integers(1, 8))
def test_tenants_share_by_weight_whatever_the_size_of_their_batches(places: int) -> None:
    share = FairShare({"big": 1.0, "double": 2.0})
    big, double = batch("big", shards=numbered(0, 8)), batch("double", shards=numbered(1000, 8))
    count = Counter[str]()
    for _ in range(60):
        for shard_id in share.choose([big, double], places=places):
            count["big" if shard_id < 1000 else "double"] += 1
    assert abs(count["double"] - 2 * count["big"]) <= 2 * (QUANTUM_TOKENS / 1000 + 2)


def test_a_batch_that_comes_to_a_busy_tenant_is_served_before_the_next_shard_of_the_old_one() -> None:
    share = FairShare({})
    old = batch(shards=numbered(0, 50), running=4)
    share.choose([old], places=4)
    new = batch(shards=numbered(1000, 2))
    chosen = share.choose([old, new], places=4)
    assert chosen[0] == 1000
    assert 1001 in chosen[:3]


def test_a_newcomer_takes_the_place_of_what_nobody_has_claimed() -> None:
    big = batch("big", shards=numbered(10, 4), running=4, unclaimed=(6, 7))
    small = batch("small", shards=numbered(100, 2))
    assert to_recall([big, small]) == [6, 7]
    assert to_recall([big, replace(small, running=1)]) == [], "it has its share out already"
    assert to_recall([replace(big, running=0), small]) == [], "nothing runs: it will be next anyway"
    assert to_recall([big]) == []


def test_a_higher_class_takes_the_place_of_a_lower_one_and_never_the_other_way() -> None:
    low = batch("a", priority=Priority.LOW, shards=numbered(10, 2), unclaimed=(1, 2))
    high = batch("a", priority=Priority.HIGH, shards=numbered(20, 2), running=3)
    assert to_recall([low, high]) == [1, 2]
    assert to_recall([replace(high, unclaimed=(8,)), batch("b", priority=Priority.LOW, shards=numbered(30, 1))]) == []


def test_credit_is_not_saved_up_while_a_flow_is_away() -> None:
    robin: DeficitRoundRobin[UUID] = DeficitRoundRobin()
    here, away = uuid7(), uuid7()
    both = [Flow(here, 1.0, 1000), Flow(away, 1.0, 1000)]
    for _ in range(10):
        robin.serve(both, robin.next(both))
    robin.forget_others([here])
    for _ in range(100):
        robin.serve(both[:1], here)
    order = []
    for _ in range(8):
        order.append(robin.next(both))
        robin.serve(both, order[-1])
    assert order[0] == away
    assert abs(order.count(away) - order.count(here)) <= 2 * QUANTUM_TOKENS / 1000
