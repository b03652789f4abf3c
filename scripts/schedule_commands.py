"""Commands about schedules: add, list, show, remove, run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import click

from models.names import batch_name, short_name
from models.states import Missed, Overlap, RunState
from pipeline.due_times import checked_cron, due_times, zone_of
from pipeline.schedules import (
    RunView,
    ScheduleView,
    change_schedule,
    filled_in,
    has_slots,
    put_schedule,
    runs_of,
    schedules_of,
)
from runtime.clock import utc_now
from runtime.errors import NotFound
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, opened_database
from scripts.scheduled_line import checked_line
from scripts.terminal import emit, emit_json, emit_table, say
from store.database import Database
from store.presence import PresenceBoard
from store.schedules import NewSchedule, ask_run, remove_schedule

TOLD_CHARACTERS = 120
NEXT_TIMES = 3  # that are told: one shows that */90 is each hour
NODE = "control"

json_option = click.option("--json", "as_json", is_flag=True)


@click.group()
def schedule() -> None:
    """Commands that are run again and again: submits, documents to add, reports, purges."""


@schedule.command()
@click.argument("name")
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND…")
@click.option("--cron", required=True, metavar="EXPRESSION", help="Minute, hour, day, month, weekday; or @daily.")
@click.option("--timezone", default="UTC", show_default=True, metavar="ZONE", help="Such as Europe/Berlin.")
@click.option(
    "--missed",
    type=click.Choice([missed.value for missed in Missed]),
    default=Missed.ONCE.value,
    show_default=True,
    help="Due times at which nobody was there to run: the last one is run, all are, or none.",
)
@click.option(
    "--overlap",
    type=click.Choice([overlap.value for overlap in Overlap]),
    help="While the run before, or its batch, has not ended: skip (the default), wait, or allow both.  [default: skip; "
    "with --missed all: wait]",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="Where it is run, and its relative paths are meant; the present folder unless given.",
)
@click.option("--replace", is_flag=True, help="Put it in the place of a schedule of this name.")
@json_option
@click.pass_obj
def add(
    settings: Settings,
    name: str,
    command: tuple[str, ...],
    cron: str,
    timezone: str,
    missed: str,
    overlap: str | None,
    folder: Path,
    replace: bool,
    as_json: bool,
) -> None:
    """Run COMMAND, such as `submit questions.jsonl`, whenever --cron says so. It is checked now.

    COMMAND is submit, documents add, documents rebuild, cache certify, cost or purge with its options, after --.
    `{due:%Y-%m-%d}` in it becomes the due time, in the schedule's zone. Each run of a submit makes a new batch.
    """
    now = utc_now()
    zone = zone_of(timezone)
    first = checked_cron(cron, zone, after=now)
    line = checked_line(command, folder=folder, due=first.astimezone(zone))
    policy = overlap or (Overlap.WAIT if missed == Missed.ALL else Overlap.SKIP)
    new = NewSchedule(TENANT, name, cron, timezone, line, str(folder.resolve()), Missed(missed), Overlap(policy))
    served = connected(settings)
    put = change_schedule if replace else put_schedule
    with opened_database(served) as database:
        put(database, new, now=now)
        view = _named(database, name)
    if as_json:
        emit_json(_figures(view))
        return
    emit(name)
    coming = [_shown(due.astimezone(zone)) for due in islice(due_times(cron, zone, after=now), NEXT_TIMES)]
    say(f"due at {', '.join(coming)}, …; run in {view.schedule.folder}")
    if has_slots(line):
        say(f"at first as: {shlex.join(filled_in(line, first.astimezone(zone)))}")
    _say_if_nobody_runs(served)


@schedule.command("list")
@json_option
@click.pass_obj
def list_(settings: Settings, as_json: bool) -> None:
    """The schedules, when each is due next, and what its last run did."""
    served = connected(settings)
    with opened_database(served) as database:
        views = schedules_of(database, TENANT, now=utc_now())
    if as_json:
        emit_json([_figures(view) for view in views])
        return
    if not views:
        say("no schedule yet: `stoker schedule add` makes one")
        return
    emit_table("schedules", ("schedule", "when", "next", "last run", "command"), [_row(view) for view in views])
    _say_if_nobody_runs(served)


@schedule.command()
@click.argument("name")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="So many runs.")
@click.option("--run", "run_id", type=int, metavar="N", help="Only this run: all that is kept of what it said.")
@json_option
@click.pass_obj
def show(settings: Settings, name: str, limit: int, run_id: int | None, as_json: bool) -> None:
    """A schedule and its last runs, the newest first: what became of each, and the last of what its command said."""
    with opened_database(connected(settings)) as database:
        view = _named(database, name)
        runs = runs_of(database, view.schedule, limit=limit if run_id is None else settings.schedule.keep_runs)
    if run_id is not None:
        _emit_said(runs, run_id, name)
        return
    if as_json:
        emit_json(_figures(view) | {"runs": [_run_figures(run) for run in runs]})
        return
    figures = _figures(view)
    shown = ("command", "cron", "timezone", "folder", "missed", "overlap")
    emit_table(name, ("figure", "value"), [("next", _shown(view.next_at)), *((key, figures[key]) for key in shown)])
    if runs:
        emit_table("runs", ("run", "due", "began", "took", "state", "batch", "said"), [_run_row(run) for run in runs])


@schedule.command()
@click.argument("name")
@json_option
@click.pass_obj
def remove(settings: Settings, name: str, as_json: bool) -> None:
    """Forget a schedule and its runs; a command that is running is ended, batches go on."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        if not remove_schedule(session, name, tenant=TENANT):
            raise _no_schedule(name)
    if as_json:
        emit_json({"schedule": name, "removed": True})
        return
    say(f"{name} is removed")


@schedule.command()
@click.argument("name")
@json_option
@click.pass_obj
def run(settings: Settings, name: str, as_json: bool) -> None:
    """Run a schedule now, beside its due times; its --overlap holds for this run too. Answers with the run's number."""
    served = connected(settings)
    with opened_database(served) as database:
        with database.transaction() as session:
            run_id = ask_run(session, name, tenant=TENANT)
        if run_id is None:
            raise _no_schedule(name)
    if as_json:
        emit_json({"schedule": name, "run": run_id})
    else:
        emit(str(run_id))
        say(f"it begins within {served.schedule.tick_s:g} s; see `stoker schedule show {name}`")
    _say_if_nobody_runs(served)


def _emit_said(runs: Sequence[RunView], run_id: int, name: str) -> None:
    found = next((view for view in runs if view.run.id == run_id), None)
    if found is None:
        raise NotFound(f"{name} has no run {run_id}, or not any more; `stoker schedule show {name}` lists them")
    emit((found.run.told or "").rstrip())


def _named(database: Database, name: str) -> ScheduleView:
    found = next((view for view in schedules_of(database, TENANT, now=utc_now()) if view.name == name), None)
    if found is None:
        raise _no_schedule(name)
    return found


def _no_schedule(name: str) -> NotFound:
    return NotFound(f"no schedule {name}; `stoker schedule list` names them")


def _say_if_nobody_runs(settings: Settings) -> None:
    board = PresenceBoard(settings.require_redis())
    try:
        if not board.workers(node=NODE):
            say("note: no control worker is live, nothing is run: start `stoker up`, or `stoker worker --node control`")
    finally:
        board.close()


def _shown(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M %Z}"


def _row(view: ScheduleView) -> tuple[object, ...]:
    stored = view.schedule
    coming = _shown(view.next_at)
    if view.overdue_since is not None:
        coming = f"overdue since {_shown(view.overdue_since)}"
    last = "" if view.last is None else f"{_shown(view.last.due_at)}: {_became(view.last)}"
    return view.name, f"{stored.cron} {stored.timezone}", coming, last, shlex.join(stored.command)


def _became(view: RunView) -> str:
    """What became of a run: of a submit, what became of its batch."""
    run, batch = view.run, view.batch
    if batch is None or run.state is not RunState.SUCCEEDED:
        return run.state.value if not run.exit_code else f"{run.state.value}, exit code {run.exit_code}"
    failed = f", {batch.failed:,} failed" if batch.failed else ""
    return f"{batch.state.value}, {batch.done:,} of {batch.total:,} jobs done{failed}"


def _run_row(view: RunView) -> tuple[object, ...]:
    run = view.run
    due = _shown(view.due_at) + (" (asked for)" if run.asked_for else "")
    began = "" if run.started_at is None else _shown(run.started_at.astimezone(view.due_at.tzinfo))
    batch = "" if run.batch_id is None else short_name(run.batch_id)
    said = (run.told or "").strip().splitlines() if run.batch_id is None else []  # a submit's is its batch
    return run.id, due, began, _took(view), _became(view), batch, said[-1][:TOLD_CHARACTERS] if said else ""


def _took(view: RunView) -> str:
    run = view.run
    return f"{(run.ended_at - run.started_at).total_seconds():.1f} s" if run.ended_at and run.started_at else ""


def _figures(view: ScheduleView) -> dict[str, Any]:
    stored = view.schedule
    return {
        "schedule": view.name,
        "command": shlex.join(stored.command),
        "cron": stored.cron,
        "timezone": stored.timezone,
        "folder": stored.folder,
        "missed": stored.missed.value,
        "overlap": stored.overlap.value,
        "next_at": _iso(view.next_at),
        "overdue_since": _iso(view.overdue_since),
        "last": None if view.last is None else _run_figures(view.last),
    }


def _run_figures(view: RunView) -> dict[str, Any]:
    run, batch = view.run, view.batch
    zone = view.due_at.tzinfo
    counts = None
    if batch is not None:
        counts = {"state": batch.state.value, "jobs": batch.total, "done": batch.done, "failed": batch.failed}
    return {
        "run": run.id,
        "due_at": _iso(view.due_at),
        "asked_for": run.asked_for,
        "state": run.state.value,
        "tries": run.tries,
        "started_at": None if run.started_at is None else _iso(run.started_at.astimezone(zone)),
        "ended_at": None if run.ended_at is None else _iso(run.ended_at.astimezone(zone)),
        "exit_code": run.exit_code,
        "batch": None if run.batch_id is None else batch_name(run.batch_id),
        "batch_counts": counts,
        "told": run.told,
    }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
