"""`stoker cost`: what work took and cost, and which is the cheaper way at this load."""

from __future__ import annotations

from datetime import timedelta

import click

from models.money import shown
from pipeline.cost_figures import figures_of
from pipeline.costs import CostLine, CostReport, EngineUse, Group, cost_report
from pipeline.ledger import ledger_of_batch, ledger_since
from runtime.clock import utc_now
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, named_batch, opened_database
from scripts.terminal import emit, emit_json, emit_table, say

MOST_DAYS = 3_650
_UNKNOWN = "–"


@click.command()
@click.argument("batch", required=False)
@click.option(
    "--by",
    type=click.Choice([group.value for group in Group]),
    help="What the lines are of; without: batch, or of one BATCH endpoint.",
)
@click.option(
    "--days", type=click.IntRange(1, MOST_DAYS), default=30, show_default=True, help="Of UTC, today counted in."
)
@click.option("--tenant", help=f"What one tenant took, such as {TENANT!r}; without: all, with idle engines.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def cost(settings: Settings, batch: str | None, by: str | None, days: int, tenant: str | None, as_json: bool) -> None:
    """What work took and cost: all of the last days, or of one BATCH since it began.

    Priced endpoints: what they asked. Own engines: their hours, spread over the tokens that they worked on.
    """
    group = Group(by) if by else Group.BATCH if batch is None else Group.ENDPOINT
    with opened_database(connected(settings)) as database:
        batch_id = None if batch is None else named_batch(database, batch)
        with database.transaction() as session:
            if batch_id is not None:
                ledger = ledger_of_batch(session, batch_id)
            else:
                since = (utc_now() - timedelta(days=days - 1)).date()
                ledger = ledger_since(session, since, tenant=tenant)
    report = cost_report(ledger, by=group, cost=settings.cost)
    if as_json:
        emit_json(figures_of(report))
        return
    if report.lines:
        emit_table(_title(batch, days), _columns(group), [_row(one, report.currency) for one in _with_total(report)])
    if report.engines:
        emit_table("Own engines", _USE_COLUMNS, [_use_row(use, report.currency) for use in report.engines])
    emit(report.sentence)
    if report.total.unpriced:
        say(
            f"{report.total.unpriced:,} jobs ran on own engines whose hour has no price, and cost more than is shown: "
            "set STOKER_ENGINE__HOUR_PRICE where workers run, or `stoker endpoints add --hour-price`"
        )


def _title(batch: str | None, days: int) -> str:
    return f"Cost of {batch}" if batch else f"Cost of the last {days} days" if days > 1 else "Cost of today"


def _columns(group: Group) -> list[str]:
    return [group.value, "jobs", "tokens in", "cached", "tokens out", "billed", "own engines", "a managed API"]


def _with_total(report: CostReport) -> list[CostLine]:
    return [*report.lines, report.total] if len(report.lines) > 1 else report.lines


def _row(line: CostLine, currency: str) -> tuple[object, ...]:
    return (
        line.name,
        f"{line.jobs:,}",
        f"{line.prompt_tokens:,}",
        f"{line.cached_tokens:,}",
        f"{line.completion_tokens:,}",
        shown(line.billed, currency) if line.billed else _UNKNOWN,
        shown(line.own, currency) if line.own else _UNKNOWN,
        _UNKNOWN if line.managed is None else shown(line.managed, currency),
    )


_USE_COLUMNS = ("engine", "hours", "with a request", "slots used", "GPU used", "cost")


def _use_row(use: EngineUse, currency: str) -> tuple[object, ...]:
    return (
        use.name,
        f"{use.hours:,.2f}",
        _percent(use.busy),
        _percent(use.slots),
        _percent(use.gpu),
        _UNKNOWN if use.cost is None else shown(use.cost, currency),
    )


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{share:.1%}"
