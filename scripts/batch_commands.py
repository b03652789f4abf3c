"""Commands about batches: status, watch, results, cancel, resume."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import click

from models.money import money, shown
from models.names import batch_name, short_name
from models.states import BudgetPeriod, Outcome
from pipeline.export import follow_lines, write_lines
from runtime.errors import BadInput
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, named_batch, opened_database, progress_of
from scripts.result_files import check_writable, replacing, write_manifest
from scripts.shown_batch import exit_code, print_summary, say_failures, say_paused, seconds_of, summary, watch_batch
from scripts.source import expect_tables
from scripts.terminal import emit_json, emit_table, say
from store.batches import BatchProgress, latest_batches, request_cancel
from store.batches import resume as resume_batch
from store.budget_tables import MONEY, TOKENS, BudgetReport
from store.database import Database
from store.results import DeadJob, WaitingJobs, dead_jobs, waiting_jobs


@click.command()
@click.argument("batch", required=False)
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--dead", is_flag=True, help="The jobs that ended as poison_job, of BATCH or of all batches.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def status(settings: Settings, batch: str | None, limit: int, dead: bool, as_json: bool) -> None:
    """Show BATCH, or the newest batches."""
    with opened_database(connected(settings)) as database:
        if dead:
            _show_dead(database, batch, limit=limit, as_json=as_json)
        elif batch is not None:
            _show_batch(database, batch, settings, as_json=as_json)
        else:
            _show_batches(database, limit=limit, as_json=as_json)


@click.command()
@click.argument("batch")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def watch(settings: Settings, batch: str, as_json: bool) -> int:
    """Follow BATCH until it has ended."""
    with opened_database(connected(settings)) as database:
        progress = watch_batch(database, named_batch(database, batch), tenant=TENANT)
    if as_json:
        emit_json(summary(progress))
    else:
        print_summary(progress)
    say_paused(progress)
    return exit_code(progress)


@click.command()
@click.argument("batch")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; stdout without it.")
@click.option("--errors", is_flag=True, help="The error file: the jobs that failed, and why.")
@click.option("--follow", is_flag=True, help="Go on, in input order, until the batch has ended.")
@click.option(
    "--table",
    "moved",
    type=click.Path(path_type=Path, exists=True),
    help="Where the table that BATCH was made of is now, if it was moved.",
)
@click.pass_obj
def results(
    settings: Settings, batch: str, output: Path | None, errors: bool, follow: bool, moved: Path | None
) -> None:
    """Write BATCH's result lines in input order, those that there are by now; a manifest goes beside a file.

    Of a batch that was made of a table, -o writes that table with its results; those of a retry stand among the ones
    of the batch that it repeats.
    """
    if moved is not None and output is None:
        raise click.UsageError("--table goes with -o: without it BATCH's lines are written, which need no table")
    if output is not None:
        check_writable(output)
    with opened_database(connected(settings)) as database, ExitStack() as stack:
        batch_id = named_batch(database, batch)
        progress = progress_of(database, batch)
        if output is not None and "table" in progress.options and not (errors or follow):
            _write_table(database, progress, output, moved)
            return
        sink = sys.stdout.buffer if output is None else stack.enter_context(replacing(output))
        if follow:
            count = _follow(database, batch_id, sink, errors=errors)
        else:
            answered, failed = write_lines(
                database, batch_id, output=None if errors else sink, errors=sink if errors else None
            )
            count = failed if errors else answered
        progress = progress_of(database, batch)
        if output is not None:
            write_manifest(database, progress, output)
    say(
        f"{count:,} lines; {progress.done:,} of {progress.total:,} jobs done, {progress.failed:,} failed"
        + (" (see --errors)" if progress.failed and not errors else "")
    )


@click.command()
@click.argument("batch")
@click.pass_obj
def cancel(settings: Settings, batch: str) -> None:
    """Cancel BATCH: nothing new starts, finished jobs keep their results, the others end as batch_cancelled."""
    with opened_database(connected(settings)) as database:
        batch_id = named_batch(database, batch)
        with database.transaction() as session:
            changed = request_cancel(session, batch_id)
        progress = progress_of(database, batch)
    if not changed:
        raise BadInput(f"{batch_name(batch_id)} is {progress.state.value} and cannot be cancelled")
    say(f"{batch_name(batch_id)} is being cancelled; {progress.done:,} of {progress.total:,} jobs have their results")


@click.command()
@click.argument("batch")
@click.pass_obj
def resume(settings: Settings, batch: str) -> None:
    """Let a paused BATCH go on; it is not paused again."""
    with opened_database(connected(settings)) as database:
        batch_id = named_batch(database, batch)
        with database.transaction() as session:
            changed = resume_batch(session, batch_id)
    if not changed:
        raise BadInput(f"{batch_name(batch_id)} is not paused")
    say(f"{batch_name(batch_id)} goes on")


def _write_table(database: Database, progress: BatchProgress, output: Path, moved: Path | None) -> None:
    expect_tables()
    from scripts.table_source import write_kept  # noqa: PLC0415  # pyarrow is an extra, and takes a while

    rows = write_kept(database, progress, output, moved=moved)
    write_manifest(database, progress, output)
    say(f"{output}: {rows:,} rows; {progress.done:,} of {progress.total:,} jobs done, {progress.failed:,} failed")


def _follow(database: Database, batch_id: UUID, sink: BinaryIO, *, errors: bool) -> int:
    count = 0
    for outcome, text in follow_lines(database, batch_id, tenant=TENANT):
        if (outcome is Outcome.FAILED) is errors:
            sink.write(text)
            sink.flush()
            count += 1
    return count


def _show_batch(database: Database, name: str, settings: Settings, *, as_json: bool) -> None:
    most_tries, currency = settings.limits.max_tries, settings.cost.currency
    progress = progress_of(database, name)
    with database.transaction() as session:
        waiting = waiting_jobs(session, progress.id)
        budgets = TOKENS.of_batch(session, progress.id)
        nanos = MONEY.of_batch(session, progress.id)
    if as_json:
        figures: dict[str, Any] = {"waiting": _waiting_figures(waiting, most_tries=most_tries)}
        figures["budgets"] = [_budget_figures(budget) for budget in budgets]
        figures["money_budgets"] = [_money_figures(budget, currency) for budget in nanos]
        emit_json(summary(progress) | figures)
        return
    print_summary(progress)
    say_failures(database, progress, tenant=TENANT)
    for budget in budgets:
        more = f", {budget.reserved:,} reserved" if budget.reserved else ""
        say(f"{_budget_name(budget)}: {budget.spent:,} of {budget.cap:,} tokens spent{more}")
    for held in nanos:
        more = f", {shown(held.reserved, currency)} reserved" if held.reserved else ""
        say(f"{_budget_name(held)}: {shown(held.spent, currency)} of {shown(held.cap, currency)} spent{more}")
    if waiting is not None:
        due = f"the next in {waiting.next_in_s:.0f} s" if waiting.next_in_s > 0 else "the next is due now"
        say(
            f"wait for another try: {waiting.jobs:,} (tries so far: {waiting.tries} of {most_tries} at most, {due}); "
            f"last error: {waiting.last_error}"
        )
    say_paused(progress)


def _budget_name(budget: BudgetReport) -> str:
    return "budget" if budget.period is BudgetPeriod.BATCH else f"{budget.period} budget of key {budget.key_id}"


def _money_figures(budget: BudgetReport, currency: str) -> dict[str, Any]:
    amounts = {name: money(getattr(budget, name)) for name in ("cap", "spent", "reserved")}
    return {"period": budget.period.value, "key": budget.key_id, "currency": currency, **amounts}


def _budget_figures(budget: BudgetReport) -> dict[str, Any]:
    return {
        "period": budget.period.value,
        "key": budget.key_id,
        "cap": budget.cap,
        "spent": budget.spent,
        "reserved": budget.reserved,
    }


def _waiting_figures(waiting: WaitingJobs | None, *, most_tries: int) -> dict[str, Any] | None:
    if waiting is None:
        return None
    return {
        "jobs": waiting.jobs,
        "tries": waiting.tries,
        "max_tries": most_tries,
        "next_at": waiting.next_at.isoformat(),
        "last_error": waiting.last_error,
    }


def _show_batches(database: Database, *, limit: int, as_json: bool) -> None:
    with database.transaction() as session:
        batches = latest_batches(session, tenant=TENANT, limit=limit)
    if as_json:
        emit_json([summary(progress) for progress in batches])
        return
    emit_table(
        "batches",
        ("batch", "state", "jobs", "done", "failed", "truncated", "tokens out", "seconds", "input"),
        [
            (
                short_name(p.id),
                "paused" if p.paused_reason else p.state.value,
                p.total,
                p.done,
                p.failed,
                p.truncated,
                p.completion_tokens,
                f"{seconds_of(p):.1f}",
                Path(p.input_name).name,
            )
            for p in batches
        ],
    )


def _show_dead(database: Database, name: str | None, *, limit: int, as_json: bool) -> None:
    batch_id = None if name is None else named_batch(database, name)
    with database.transaction() as session:
        dead = dead_jobs(session, tenant=TENANT, batch_id=batch_id, limit=limit)
    if as_json:
        emit_json([_dead_figures(job) for job in dead])
        return
    emit_table(
        "jobs that ended as poison_job",
        ("batch", "line", "custom_id", "message"),
        [(short_name(job.batch_id), job.seq + 1, job.custom_id, job.message) for job in dead],
    )


def _dead_figures(job: DeadJob) -> dict[str, Any]:
    return {
        "batch": batch_name(job.batch_id),
        "line": job.seq + 1,
        "custom_id": job.custom_id,
        "message": job.message,
        "at": job.at.isoformat(),
    }
