"""What work costs, by batch, key, day or endpoint, and whether own engines are the cheaper way at this load.

Priced endpoints: what they asked, exactly. Own engines: what a day of an engine costs is spread over the tokens that it
worked on in that day, by weight, so that the parts add up to the whole. docs/costs.md has the formulas in words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from typing import Any, Final

from models.endpoints import Prices
from models.jobs import Usage
from models.money import shown
from models.names import batch_name
from pipeline.ledger import Ledger, engine_name
from runtime.settings import CostSettings
from store.costs import HeldDay, KnownEngine, Taken
from store.usage import SINGLE

# What a token weighs when an engine's day is spread, in tenths of a prompt token that had to be computed. An output
# token is one step of the whole model for itself, prompt tokens are computed hundreds at a time: managed APIs, which
# know their costs, ask 3 to 5 times as much for it. A cached token is looked up; they ask a tenth to a half.
PROMPT_WEIGHT: Final = 10
OUTPUT_WEIGHT: Final = 40
CACHED_WEIGHT: Final = 1

IDLE: Final = "(no jobs)"
_HOUR_S: Final = 3_600


class Group(StrEnum):
    """What the lines of a report are of."""

    BATCH = "batch"
    KEY = "key"
    DAY = "day"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class CostLine:
    """What one batch, key, day or endpoint took: tokens, and money in nanos.

    `billed` is what priced endpoints asked, `own` the part of own engines' cost, `managed` what a managed API would
    have asked for the same tokens: None where no price of one is stated. `unpriced` jobs ran on own engines whose
    hour has no price: their cost is not in `own`.
    """

    name: str
    jobs: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    billed: int = 0
    own: int = 0
    managed: int | None = None
    unpriced: int = 0

    @property
    def cost(self) -> int:
        """All that it cost."""
        return self.billed + self.own


@dataclass(frozen=True, slots=True)
class EngineUse:
    """How an own engine was used: shares of its time with a request, of its slots, of its GPUs; None: not known.

    `cost` in nanos is None where its hour has no price.
    """

    name: str
    hours: float
    busy: float | None
    slots: float | None
    gpu: float | None
    cost: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Own engines beside a managed API, for the tokens that they worked on: nanos, and shares of full use.

    `break_even`: the utilisation from which on own engines are cheaper; above 1 they never are.
    """

    own: int
    managed: int
    tokens: int
    utilisation: float | None
    break_even: float | None
    others: int = 0
    """Jobs that ran where neither an hour nor a token has a price that is known."""


@dataclass(frozen=True, slots=True)
class CostReport:
    """`lines` add up to `total`; money in nanos of `currency`."""

    by: Group
    currency: str
    lines: list[CostLine]
    total: CostLine
    engines: list[EngineUse]
    comparison: Comparison | None
    sentence: str


def cost_report(ledger: Ledger, *, by: Group, cost: CostSettings, shows_use: bool = True) -> CostReport:
    """The report. Not `shows_use`: how much engines worked is left out, for it tells of others' work too."""
    managed = managed_prices(cost)
    spread, idle = spread_costs(ledger.held, ledger.beside)
    costed = {(day.engine_id, day.day) for day in ledger.held if day.cost}
    lines: dict[str, CostLine] = {}
    named = _namer(by, ledger)
    for row in ledger.taken:
        line = _line_of(row, spread, costed, ledger.engines, managed)
        name = named(row)
        lines[name] = _sum(name, [lines[name], line] if name in lines else [line])
    if idle:
        lines = _with_idle(lines, idle, by=by, ledger=ledger, managed=managed)
    total = _sum("total", lines.values(), none=0 if managed else None)
    comparison = _compare(ledger, spread, idle, managed, shows_use=shows_use)
    return CostReport(
        by=by,
        currency=cost.currency,
        lines=list(lines.values()),
        total=total,
        engines=_uses(ledger) if shows_use else [],
        comparison=comparison,
        sentence=sentence_of(comparison, total, managed=managed, currency=cost.currency),
    )


def spread_costs(
    held: Iterable[HeldDay], taken: Sequence[Taken]
) -> tuple[dict[Taken, int], dict[tuple[int, date], int]]:
    """Each engine's day spread over what was taken of it, and the cost of days on which nothing was, in nanos.

    Both together are what all days cost, to the nano.
    """
    of_day: dict[tuple[int, date], list[Taken]] = defaultdict(list)
    for row in taken:
        of_day[row.engine_id, row.day].append(row)
    spread: dict[Taken, int] = {}
    idle: dict[tuple[int, date], int] = {}
    for day in held:
        key = day.engine_id, day.day
        if rows := of_day.get(key):
            parts = shares(day.cost, [weight_of(row) for row in rows])
            spread |= dict(zip(rows, parts, strict=True))
        elif day.cost:
            idle[key] = day.cost
    return spread, idle


def weight_of(row: Taken) -> int:
    """How much of its engine's day it stands for; at least 1, that of a job without tokens."""
    cached = min(row.cached_tokens, row.prompt_tokens)
    computed = row.prompt_tokens - cached
    return max(1, PROMPT_WEIGHT * computed + CACHED_WEIGHT * cached + OUTPUT_WEIGHT * row.completion_tokens)


def shares(whole: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `whole`: by the largest remainders."""
    total = sum(weights)
    parts = [whole * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: -(whole * weights[place] % total))
    for place in by_remainder[: whole - sum(parts)]:
        parts[place] += 1
    return parts


def managed_prices(cost: CostSettings) -> Prices | None:
    """What a managed API asks; None where the settings do not state both prices."""
    if cost.managed_input_price is None or cost.managed_output_price is None:
        return None
    return Prices(input=cost.managed_input_price, output=cost.managed_output_price, cached=cost.managed_cached_price)


def sentence_of(comparison: Comparison | None, total: CostLine, *, managed: Prices | None, currency: str) -> str:
    """Which is cheaper at this load, in one sentence; or what is missing to say so."""
    if not total.jobs and comparison is None:
        return "Nothing ran on an engine or endpoint."
    if managed is None:
        return (
            f"It cost {shown(total.cost, currency)}; state what a managed API asks (STOKER_COST__MANAGED_INPUT_PRICE "
            "and STOKER_COST__MANAGED_OUTPUT_PRICE, for a million tokens) to see which is cheaper at this load."
        )
    if comparison is None:
        if total.unpriced:
            return (
                "What own engines cost is not known: state STOKER_ENGINE__HOUR_PRICE where workers run, or the "
                "endpoint's hour price, and see which is cheaper at this load from then on."
            )
        return (
            f"No own engine was used: priced endpoints asked {shown(total.billed, currency)}, the managed API that "
            f"the settings name would have asked {shown(total.managed or 0, currency)}."
        )
    return _verdict(comparison, currency)


def _verdict(found: Comparison, currency: str) -> str:
    own, managed = shown(found.own, currency), shown(found.managed, currency)
    of_some = f"; {found.others:,} jobs ran where no hour's price is known" if found.others else ""
    if found.own <= found.managed:
        said = (
            f"At this load own engines are cheaper: {own} for {found.tokens:,} tokens, "
            f"where a managed API would have asked {managed}"
        )
    else:
        said = (
            f"At this load a managed API would be cheaper: it would have asked {managed} for {found.tokens:,} tokens, "
            f"which cost {own} on own engines"
        )
    if found.utilisation is None or found.break_even is None:
        return f"{said}{of_some}."
    used = f"{said}; they were used to {found.utilisation:.1%}"
    if found.break_even > 1:
        return f"{used}, and at these prices even full use would not make them the cheaper way{of_some}."
    return f"{used} and break even at {found.break_even:.1%}{of_some}."


def _compare(
    ledger: Ledger,
    spread: Mapping[Taken, int],
    idle: Mapping[tuple[int, date], int],
    managed: Prices | None,
    *,
    shows_use: bool,
) -> Comparison | None:
    """None without a managed API's prices, or where no own engine's cost is known."""
    days = [day for day in ledger.held if day.cost]
    if managed is None or not days:
        return None
    costed = {(day.engine_id, day.day) for day in days}
    mine = [row for row in ledger.taken if (row.engine_id, row.day) in costed]
    if not mine and not idle:
        return None
    utilisation = break_even = None
    if shows_use:
        all_worth = _worth([row for row in ledger.beside if (row.engine_id, row.day) in costed], managed)
        utilisation = _utilisation(days)
        break_even = break_even_of(sum(day.cost for day in days), all_worth, utilisation)
    return Comparison(
        own=sum(spread[row] for row in mine) + sum(idle.values()),
        managed=_worth(mine, managed),
        tokens=sum(row.prompt_tokens + row.completion_tokens for row in mine),
        utilisation=utilisation,
        break_even=break_even,
        others=sum(row.jobs for row in ledger.taken if (row.engine_id, row.day) not in costed and not row.cost),
    )


def break_even_of(cost: int, worth: int, utilisation: float | None) -> float | None:
    """The utilisation from which on own engines are cheaper than a managed API; None where it cannot be told.

    `cost` of engines that were used to `utilisation` and did work that the API asks `worth` for. At full use they would
    do 1/utilisation of that in the same time: hour price ÷ worth of an hour at full use = cost ÷ (worth/utilisation).
    """
    return None if not utilisation or not worth else cost / worth * utilisation


def _utilisation(days: Sequence[HeldDay]) -> float | None:
    """Slots in use of all; where no slots were read, the GPUs' use."""
    slots_s = sum(day.slots_s for day in days)
    if slots_s:
        return sum(day.slot_s for day in days) / slots_s
    return _ratio(sum(day.gpu_s for day in days), sum(day.gpu_read_s for day in days))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _worth(rows: Iterable[Taken], managed: Prices) -> int:
    """What the managed API asks for all of these tokens."""
    return managed.cost_nanos(_usage(rows))


def _usage(rows: Iterable[Taken]) -> Usage:
    prompt = completion = cached = 0
    for row in rows:
        prompt, completion = prompt + row.prompt_tokens, completion + row.completion_tokens
        cached += min(row.cached_tokens, row.prompt_tokens)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)


def _line_of(
    row: Taken,
    spread: Mapping[Taken, int],
    costed: set[tuple[int, date]],
    engines: Mapping[int, KnownEngine],
    managed: Prices | None,
) -> CostLine:
    is_unpriced = (row.engine_id, row.day) not in costed and not _asks_for_tokens(engines.get(row.engine_id))
    return CostLine(
        name="",
        jobs=row.jobs,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        cached_tokens=row.cached_tokens,
        billed=row.cost,
        own=spread.get(row, 0),
        managed=None if managed is None else _worth([row], managed),
        unpriced=row.jobs if is_unpriced else 0,
    )


def _asks_for_tokens(engine: KnownEngine | None) -> bool:
    """Whether it is somebody else's, billed by the token or free."""
    described: Mapping[str, Any] = {} if engine is None else engine.description
    return described.get("kind") == "endpoint" and described.get("trust") != "own"


def _sum(name: str, lines: Iterable[CostLine], *, none: int | None = None) -> CostLine:
    """The lines as one."""
    found = CostLine(name, managed=none)
    for line in lines:
        managed = (found.managed or 0) + line.managed if line.managed is not None else found.managed
        found = CostLine(
            name,
            jobs=found.jobs + line.jobs,
            prompt_tokens=found.prompt_tokens + line.prompt_tokens,
            completion_tokens=found.completion_tokens + line.completion_tokens,
            cached_tokens=found.cached_tokens + line.cached_tokens,
            billed=found.billed + line.billed,
            own=found.own + line.own,
            managed=managed,
            unpriced=found.unpriced + line.unpriced,
        )
    return found


def _with_idle(
    lines: Mapping[str, CostLine],
    idle: Mapping[tuple[int, date], int],
    *,
    by: Group,
    ledger: Ledger,
    managed: Prices | None,
) -> dict[str, CostLine]:
    """The lines with what engines cost on days without a job: on the engine's or the day's line, else on its own."""
    found = dict(lines)
    for (engine_id, day), cost in sorted(idle.items()):
        names = {Group.DAY: day.isoformat(), Group.ENDPOINT: engine_name(ledger.engines.get(engine_id), engine_id)}
        name = names.get(by, IDLE)
        line = found.get(name) or CostLine(name, managed=None if managed is None else 0)
        found[name] = replace(line, own=line.own + cost)
    return dict(sorted(found.items())) if by is Group.DAY else found


def _namer(by: Group, ledger: Ledger) -> Callable[[Taken], str]:
    def of_batch(row: Taken) -> str:
        if row.batch_id == SINGLE:
            return "single requests"
        made_of = ledger.input_names.get(row.batch_id)
        return batch_name(row.batch_id) + (f" {made_of}" if made_of else "")

    def of_key(row: Taken) -> str:
        if not row.key_id:
            return f"{row.tenant}: no key"
        name = ledger.key_names.get(row.key_id)
        return f"{row.tenant}: {row.key_id}" + (f" {name}" if name else "")

    return {
        Group.BATCH: of_batch,
        Group.KEY: of_key,
        Group.DAY: lambda row: row.day.isoformat(),
        Group.ENDPOINT: lambda row: engine_name(ledger.engines.get(row.engine_id), row.engine_id),
    }[by]


def _uses(ledger: Ledger) -> list[EngineUse]:
    """How own engines were used over their days, by name."""
    days: dict[str, list[HeldDay]] = defaultdict(list)
    for day in ledger.held:
        days[engine_name(ledger.engines.get(day.engine_id), day.engine_id)].append(day)
    return [_use(name, days[name]) for name in sorted(days)]


def _use(name: str, days: Sequence[HeldDay]) -> EngineUse:
    slots_s, up_s = sum(day.slots_s for day in days), sum(day.up_s for day in days)
    return EngineUse(
        name=name,
        hours=up_s / _HOUR_S,
        busy=_ratio(sum(day.busy_s for day in days), up_s) if slots_s else None,
        slots=_ratio(sum(day.slot_s for day in days), slots_s),
        gpu=_ratio(sum(day.gpu_s for day in days), sum(day.gpu_read_s for day in days)),
        cost=sum(day.cost for day in days) or None,
    )
