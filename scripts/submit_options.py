"""Options that say how a batch is to run, the same for every command that begins one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import click
from pydantic import TypeAdapter, ValidationError

from models.lines import SubmitOptions, parse_sets
from models.money import Amount, nanos_of
from models.states import CacheMode, JobOrder, Priority, Trust
from pipeline.submit import Wishes
from runtime.settings import LEAST_WEIGHT, MOST_WEIGHT, Settings
from scripts.terminal import say

LONGEST_KEY = 255
_AMOUNT = TypeAdapter(Amount)
_WINDOW_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Window(click.ParamType[float]):
    """A duration such as 90m, 24h or 7d, in seconds."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in _WINDOW_UNITS or not number.isdigit() or int(number) == 0:
            self.fail(f"{value!r} is no duration; write 90m, 24h or 7d", param, ctx)
        return float(int(number) * _WINDOW_UNITS[unit])


class MoneyAmount(click.ParamType[int]):
    """An amount of money such as 5 or 0.25, in nanos; it is stated in STOKER_COST__CURRENCY."""

    name = "AMOUNT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return nanos_of(_AMOUNT.validate_python(value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            self.fail(f"{value!r:.80} is no amount of money ({reason}); write 5 or 0.25", param, ctx)


class IdempotencyKey(click.ParamType[str]):
    """A name that stands for one batch."""

    name = "KEY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        key = str(value)
        if not 0 < len(key) <= LONGEST_KEY or not key.isprintable():
            self.fail(
                f"{value!r:.80} is no key; write 1 to {LONGEST_KEY} letters, such as orders-2026-11-29", param, ctx
            )
        return key


class Weight(click.ParamType[float]):
    """A share, within what the dispatcher can count with."""

    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            self.fail(
                f"{value!r} is no weight; write a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, such as 2 or 0.5",
                param,
                ctx,
            )
        return weight


PRIORITY_OPTION = click.option(
    "--priority",
    type=click.Choice([priority.value for priority in Priority]),
    help="Class of the batch: a higher class is dispatched first.",
)
WEIGHT_OPTION = click.option("--weight", type=Weight(), help="The batch's share among your batches of its class.")
WINDOW_OPTION = click.option(
    "--window", type=Window(), help="Completion window, e.g. 24h; unfinished jobs then expire."
)
TRUST_OPTION = click.option(
    "--trust",
    type=click.Choice([trust.value for trust in Trust]),
    help="Where prompts may go: own, to machines of yours only, as if it is left out; external, to external endpoints "
    "too.",
)
MONEY_OPTION = click.option(
    "--budget-money",
    "budget_nanos",
    type=MoneyAmount(),
    help="The most that endpoints which bill tokens may ask for all jobs together, in STOKER_COST__CURRENCY; needs "
    "--trust external. Without a budget, this one or the key's, they are not used.",
)
_OPTIONS = (
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Set a field of every request, e.g. --set temperature=0. Repeatable.",
    ),
    click.option("--model", help="Replace the model that every line names."),
    click.option(
        "--max-output-tokens",
        type=click.IntRange(min=1),
        help="Hard limit of output tokens of one completion; larger wishes are clamped.",
    ),
    click.option(
        "--budget-tokens",
        type=click.IntRange(min=1, max=2**62),
        help="The most tokens that all jobs together may take, prompts and outputs; those that no longer fit end as "
        "budget_exceeded.",
    ),
    TRUST_OPTION,
    MONEY_OPTION,
    click.option(
        "--cache",
        type=click.Choice([mode.value for mode in CacheMode]),
        help="exact: an equal request that was answered before is not run again. semantic: nor is one that means the "
        "same, within a certified error. A line's own stoker.cache overrides it.",
    ),
    click.option(
        "--order",
        type=click.Choice([order.value for order in JobOrder]),
        default=JobOrder.PREFIX.value,
        show_default=True,
        help="In which jobs run: prefix puts prompts that begin alike together, long outputs first, if the file does "
        "not; prefix-short puts short outputs first; file keeps the file's. Results are in the file's order.",
    ),
    click.option(
        "--validate-answers",
        is_flag=True,
        help="Hold each answer to the JSON schema that its request states, with one repair; else the job fails.",
    ),
    WINDOW_OPTION,
    PRIORITY_OPTION,
    WEIGHT_OPTION,
)


@dataclass(frozen=True, slots=True)
class How:
    """What a command line says of how its batch is to run."""

    sets: tuple[str, ...]
    model: str | None
    max_output_tokens: int | None
    budget_tokens: int | None
    trust: str | None
    budget_nanos: int | None
    cache: str | None
    order: str
    validate_answers: bool
    window: float | None
    priority: str | None
    weight: float | None

    def options(self, settings: Settings, *, common: Mapping[str, Any], validate_answers: bool) -> SubmitOptions:
        """What is changed in every line; `common` are settings of those lines that do not state them."""
        return SubmitOptions(
            sets=parse_sets(self.sets),
            model=self.model,
            max_output_tokens=self.max_output_tokens or settings.limits.max_output_tokens,
            cache=self.cache_mode(settings),
            settings=dict(common),
            validate_answers=validate_answers or self.validate_answers,
            trust=Trust(self.trust or Trust.OWN),
        )

    def cache_mode(self, settings: Settings) -> CacheMode:
        """Which earlier answers may serve it."""
        return CacheMode(self.cache or settings.cache.mode)

    def wishes(self, *, results_of: UUID | None = None, spent_tokens: int = 0, spent_nanos: int = 0) -> Wishes:
        """How it runs among others; of its budgets so much was taken before."""
        priority = Priority(self.priority or Priority.NORMAL)
        budget = None if self.budget_tokens is None else max(1, self.budget_tokens - spent_tokens)
        nanos = None if self.budget_nanos is None else max(1, self.budget_nanos - spent_nanos)
        return Wishes(priority, self.weight or 1.0, results_of, JobOrder(self.order), budget, nanos)


def with_how(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with these options, which it gets as `how`."""

    @functools.wraps(command)
    def inner(*args: Any, **given: Any) -> Any:
        how = how_of({name: given.pop(name) for name in How.__dataclass_fields__})
        return command(*args, how=how, **given)

    for option in reversed(_OPTIONS):
        inner = option(inner)
    return inner


def how_of(params: Mapping[str, Any]) -> How:
    """What a command's parameters say of how its batch is to run. Raises UsageError where they contradict."""
    how = How(**{name: params[name] for name in How.__dataclass_fields__})
    if how.budget_nanos is not None and how.trust != Trust.EXTERNAL:
        raise click.UsageError(
            "--budget-money would never be used, as prompts stay on own endpoints: add --trust external, or leave it "
            "out"
        )
    if how.trust == Trust.EXTERNAL and how.budget_nanos is None:
        say(
            "note: without --budget-money, or a key's, endpoints that bill tokens are not used; jobs whose model only "
            "these serve end as budget_exceeded"
        )
    return how


def with_window(settings: Settings, window_s: float | None) -> Settings:
    """The settings with this completion window, if one is given."""
    if window_s is None:
        return settings
    return settings.model_copy(update={"limits": settings.limits.model_copy(update={"window_s": window_s})})
