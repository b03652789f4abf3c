"""Reports of costs: own engines' days spread over tokens, and which way is cheaper."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.endpoints import NANOS
from models.money import plain, shown
from pipeline.costs import Group, break_even_of, cost_report, shares, spread_costs
from pipeline.ledger import Ledger, with_own_endpoints
from runtime.settings import CostSettings
from store.costs import HeldDay, KnownEngine, Taken

DAY = date(2026, 11, 28)
NEXT = date(2026, 11, 29)
OWN, PRICED = 1, 2
FIRST, SECOND = UUID(int=1), UUID(int=2)
BEGAN = datetime(2026, 11, 1, tzinfo=UTC)
ENGINES = {
    OWN: KnownEngine(OWN, {"kind": "vllm", "checkpoint": "qwen"}, BEGAN),
    PRICED: KnownEngine(PRICED, {"kind": "endpoint", "name": "cloud", "trust": "external"}, BEGAN),
}
# A million prompt tokens for 1 USD, of output for 4 USD: as own tokens are weighed.
MANAGED = CostSettings(managed_input_price=Decimal(1), managed_output_price=Decimal(4))

numbers = st.integers(0, 10**7)
rows = st.lists(
    st.builds(
        Taken,
        tenant=st.just("t"),
        key_id=st.sampled_from(["", "key"]),
        batch_id=st.uuids(),
        engine_id=st.sampled_from([1, 2, 3]),
        day=st.sampled_from([DAY, NEXT]),
        jobs=st.integers(1, 1000),
        prompt_tokens=numbers,
        completion_tokens=numbers,
        cached_tokens=numbers,
        cost=numbers,
    ),
    max_size=8,
    unique_by=lambda row: row.batch_id,
)
held_days = st.lists(
    st.builds(HeldDay, st.sampled_from([1, 2, 3]), st.sampled_from([DAY, NEXT]), *[st.just(1.0)] * 6, cost=numbers),
    unique_by=lambda day: (day.engine_id, day.day),
)


def took(batch_id: UUID = FIRST, engine_id: int = OWN, *, prompt: int = 0, output: int = 0, cost: int = 0) -> Taken:
    """What 10 jobs took."""
    return Taken("local", "", batch_id, engine_id, DAY, 10, prompt, output, 0, cost)


def held(*, hours: float, slots: float, cost: int, day: date = DAY) -> HeldDay:
    """A day of the own engine, which has 4 slots; so many of them were used in the mean."""
    up_s = hours * 3600
    return HeldDay(OWN, day, up_s, up_s * slots, up_s * slots * 4, up_s * 4, 0.0, 0.0, cost)


def ledger(taken: list[Taken], days: list[HeldDay], *, beside: list[Taken] | None = None) -> Ledger:
    """Of two batches, the first of which has a name."""
    return Ledger(taken, taken if beside is None else beside, days, ENGINES, {}, {FIRST: "first.jsonl"})


@given(st.integers(0, 10**15), st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_shares_add_up_to_the_whole_and_are_fair_to_the_nano(whole: int, weights: list[int]) -> None:
    parts = shares(whole, weights)
    assert sum(parts) == whole
    assert all(
        abs(part * sum(weights) - whole * weight) < sum(weights) for part, weight in zip(parts, weights, strict=True)
    )


@given(rows, held_days)
def test_what_is_spread_and_what_is_idle_are_what_all_days_cost(taken: list[Taken], days: list[HeldDay]) -> None:
    spread, idle = spread_costs(days, taken)
    assert sum(spread.values()) + sum(idle.values()) == sum(day.cost for day in days)


@given(rows, held_days, st.sampled_from(Group))
def test_lines_add_up_to_all_that_was_billed_and_all_that_engines_cost(
    taken: list[Taken], days: list[HeldDay], by: Group
) -> None:
    report = cost_report(ledger(taken, days), by=by, cost=MANAGED)
    assert sum(line.cost for line in report.lines) == report.total.cost
    assert report.total.cost == sum(row.cost for row in taken) + sum(day.cost for day in days)
    assert report.total.jobs == sum(row.jobs for row in taken)


def test_an_output_token_stands_for_four_prompt_tokens() -> None:
    taken = [took(FIRST, prompt=400), took(SECOND, output=100)]
    report = cost_report(ledger(taken, [held(hours=1, slots=1, cost=1000)]), by=Group.BATCH, cost=CostSettings())
    assert [line.own for line in report.lines] == [500, 500]
    assert [line.name for line in report.lines] == [f"batch_{FIRST.hex} first.jsonl", f"batch_{SECOND.hex}"]


def test_a_batch_bears_its_part_of_the_engines_it_shared() -> None:
    mine, other = took(FIRST, output=100), took(SECOND, output=300)
    days = [held(hours=1, slots=0.5, cost=4 * NANOS)]
    report = cost_report(ledger([mine], days, beside=[mine, other]), by=Group.ENDPOINT, cost=MANAGED)
    assert [(line.name, line.own) for line in report.lines] == [("vllm qwen", NANOS)]


def test_priced_endpoints_are_told_as_billed_and_not_compared_with_own_engines() -> None:
    taken = [took(FIRST, PRICED, prompt=1_000_000, cost=7), took(FIRST, output=1_000_000)]
    report = cost_report(ledger(taken, [held(hours=1, slots=0.5, cost=NANOS)]), by=Group.ENDPOINT, cost=MANAGED)
    assert [(line.name, line.billed, line.own, line.managed) for line in report.lines] == [
        ("cloud", 7, 0, NANOS),
        ("vllm qwen", 0, NANOS, 4 * NANOS),
    ]
    assert report.comparison is not None
    assert (report.comparison.own, report.comparison.managed) == (NANOS, 4 * NANOS)


def test_the_break_even_is_where_full_use_would_be_worth_the_hour() -> None:
    # 2 USD an hour, half used, did work worth 4 USD: at full use 8 USD an hour, so a quarter is enough.
    report = cost_report(
        ledger([took(output=1_000_000)], [held(hours=1, slots=0.5, cost=2 * NANOS)]), by=Group.DAY, cost=MANAGED
    )
    assert report.comparison is not None
    assert (report.comparison.utilisation, report.comparison.break_even) == (0.5, 0.25)
    assert report.sentence == (
        "At this load own engines are cheaper: 2.00 USD for 1,000,000 tokens, where a managed API would have asked "
        "4.00 USD; they were used to 50.0% and break even at 25.0%."
    )


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.floats(0.01, 1.0))
def test_own_engines_are_cheaper_exactly_above_the_break_even(cost: int, worth: int, used: float) -> None:
    break_even = break_even_of(cost, worth, used)
    assert break_even is not None
    if abs(cost - worth) > 1e-9 * worth:
        assert (cost < worth) == (used > break_even)


def test_an_engine_that_idles_is_the_dearer_way_and_says_from_when_on_it_is_not() -> None:
    days = [held(hours=24, slots=0.1, cost=40 * NANOS), held(hours=24, slots=0.0, cost=40 * NANOS, day=NEXT)]
    report = cost_report(ledger([took(output=10_000_000)], days), by=Group.BATCH, cost=MANAGED)
    assert [line.name for line in report.lines][1:] == ["(no jobs)"]
    assert report.sentence == (
        "At this load a managed API would be cheaper: it would have asked 40.00 USD for 10,000,000 tokens, which cost "
        "80.00 USD on own engines; they were used to 5.0% and break even at 10.0%."
    )
    by_day = cost_report(ledger([took(output=10_000_000)], days), by=Group.DAY, cost=MANAGED)
    assert [(line.name, line.own) for line in by_day.lines] == [
        ("2026-11-28", 40 * NANOS),
        ("2026-11-29", 40 * NANOS),
    ]


def test_full_use_that_would_not_pay_is_said() -> None:
    report = cost_report(
        ledger([took(output=1000)], [held(hours=1, slots=0.5, cost=NANOS)]), by=Group.DAY, cost=MANAGED
    )
    assert report.sentence.endswith("even full use would not make them the cheaper way.")


@pytest.mark.parametrize(
    ("taken", "days", "cost", "said"),
    [
        ([], [], MANAGED, "Nothing ran"),
        ([took(output=1)], [held(hours=1, slots=1, cost=5)], CostSettings(), "STOKER_COST__MANAGED_INPUT_PRICE"),
        ([took(output=1)], [held(hours=1, slots=1, cost=0)], MANAGED, "STOKER_ENGINE__HOUR_PRICE"),
        ([took(FIRST, PRICED, output=1, cost=5)], [], MANAGED, "No own engine was used"),
    ],
)
def test_what_is_missing_for_a_verdict_is_named(
    taken: list[Taken], days: list[HeldDay], cost: CostSettings, said: str
) -> None:
    assert said in cost_report(ledger(taken, days), by=Group.BATCH, cost=cost).sentence


def test_how_much_engines_work_is_not_told_to_a_tenant() -> None:
    found = ledger([took(output=1_000_000)], [held(hours=1, slots=0.5, cost=NANOS)])
    report = cost_report(found, by=Group.DAY, cost=MANAGED, shows_use=False)
    assert report.engines == []
    assert "used to" not in report.sentence


def test_an_own_endpoint_costs_whole_days_on_which_it_answered() -> None:
    described = {"kind": "endpoint", "name": "next-door", "trust": "own", "hour_price": "0.5"}
    added = KnownEngine(OWN, described, datetime(2026, 11, 28, 12, tzinfo=UTC))
    taken = [took(output=1), replace(took(output=1), day=NEXT)]
    now = datetime(2026, 11, 29, 6, tzinfo=UTC)
    days = with_own_endpoints([], taken, {OWN: added}, now=now)
    assert [(day.day, day.up_s, day.cost) for day in days] == [
        (DAY, 12 * 3600, 6 * NANOS),
        (NEXT, 6 * 3600, 3 * NANOS),
    ]
    dearer = KnownEngine(PRICED, described | {"hour_price": "1"}, datetime(2026, 11, 29, 4, tzinfo=UTC))
    taken.append(replace(took(output=1), day=NEXT, engine_id=PRICED))
    days = with_own_endpoints([], taken, {OWN: added, PRICED: dearer}, now=now)
    assert [day.cost for day in days] == [6 * NANOS, 2 * NANOS, 2 * NANOS], "another price holds from then on"


def test_money_is_shown_with_the_digits_that_say_something() -> None:
    assert [plain(nanos) for nanos in (0, 123_000, NANOS, -1_500_000_000)] == ["0", "0.000123", "1", "-1.5"]
    assert [shown(nanos, "EUR") for nanos in (0, 1, 123_456, 41_260_000, 500_000_000, 1_204_500_000_000)] == [
        "0.00 EUR",
        "0.000000001 EUR",
        "0.000123 EUR",
        "0.0413 EUR",
        "0.500 EUR",
        "1,204.50 EUR",
    ]
