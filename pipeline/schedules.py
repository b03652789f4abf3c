"""Schedules: due times become runs, and a run is carried out by one process at a time, however many look.

Any line may be the last that runs. What was not committed is done again by who looks next; a run whose process died
waits again, with the same key for its submit, so that it makes no second batch.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from models.names import batch_name
from models.states import Missed, Overlap, RunState
from pipeline.due_times import checked_cron, due_times, owed, zone_of
from pipeline.heartbeat import Heartbeat
from runtime import metrics
from runtime.clock import utc_now
from runtime.errors import BadInput
from runtime.logs import get_logger
from runtime.settings import ScheduleSettings
from store.batches import BatchProgress, progress_of_batches
from store.database import Database, Session
from store.schedules import (
    ClaimedRun,
    NewSchedule,
    RunRow,
    StoredSchedule,
    add_schedule,
    advance_schedule,
    claim_run,
    database_now,
    end_run,
    extend_run_leases,
    give_back_run,
    hold_schedule_of,
    insert_missed,
    insert_runs,
    is_behind,
    last_runs,
    latest_runs,
    prune_runs,
    replace_schedule,
    runs_to_send,
    schedules_of_all,
    schedules_of_tenant,
    skip_run,
    take_back_runs,
)
from store.submissions import batch_of_key

log = get_logger(__name__)

BEATS_A_LEASE: Final = 3  # two may be missed
MOST_TRIES: Final = 3  # of a run whose worker dies, or whose services do not answer
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
TOLD_CHARACTERS: Final = 4_000
SUBMIT: Final = "submit"
KEY_OPTION: Final = "--idempotency-key"
_BEHIND: Final = "the run before it, or its batch, had not ended"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_DUE = re.compile(r"\{due:([^{}]*%[^{}]*)\}")


@dataclass(frozen=True, slots=True)
class DueRun:
    """A run whose hint is to be sent; the time in its schedule's zone."""

    run_id: int
    schedule: str
    due_at: datetime


@dataclass(frozen=True, slots=True)
class TakenRun:
    """A run to be carried out: the command line after `stoker`, filled in, and where it is run."""

    run_id: int
    fence: int
    schedule: str
    tenant: str
    command: list[str]
    folder: str
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of the command; `told` is the end of what it said. `given_back`: it was ended, to begin again."""

    exit_code: int
    told: str
    batch_id: UUID | None = None
    given_back: bool = False


IsOurs = Callable[[], bool]
Execute = Callable[[TakenRun, IsOurs], Ran]


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as it is shown, times in its schedule's zone; `batch` is a submit's, as it stands now."""

    run: RunRow
    due_at: datetime
    batch: BatchProgress | None


@dataclass(frozen=True, slots=True)
class ScheduleView:
    """A schedule as it is shown, times in its zone. `overdue_since`: a due time has no run yet."""

    schedule: StoredSchedule
    next_at: datetime | None
    overdue_since: datetime | None
    last: RunView | None

    @property
    def name(self) -> str:
        """What it is called."""
        return self.schedule.name


def look(database: Database, *, settings: ScheduleSettings, now: datetime | None = None) -> list[DueRun]:
    """Make runs of what is due, take back those of dead workers: the runs whose hint is to be sent now.

    Many may look at once: a due time has one run, and a hint is noted as sent by one of them. One that is noted and
    never sent is noted again a minute later. `now` is Postgres's clock unless given.
    """
    with database.transaction() as session:
        moment = now or database_now(session)
        schedules = schedules_of_all(session)
    for schedule in schedules:
        try:
            _make_runs(database, schedule, settings=settings, now=moment)
        except BadInput as error:  # such as a zone that this machine does not know: no other schedule waits for it
            log.warning("schedule_unreadable", schedule=schedule.name, error=str(error))
    with database.transaction() as session:
        taken_back = take_back_runs(session, lease_s=settings.lease_s, most_tries=MOST_TRIES)
    for run in taken_back:
        log.warning("schedule_run_taken_back", schedule=run.schedule, run=run.id, state=run.state.value)
        if run.state is RunState.FAILED:
            metrics.SCHEDULE_RUNS.add(1, schedule=run.schedule, outcome=run.state.value)
    with database.transaction() as session:
        sent = runs_to_send(session, now=moment)
    metrics.SCHEDULE_LOOK.set(time.time())
    return [DueRun(run.id, run.schedule, _local(run.due_at, run.timezone)) for run in sent]


def _make_runs(database: Database, schedule: StoredSchedule, *, settings: ScheduleSettings, now: datetime) -> None:
    zone = zone_of(schedule.timezone)
    found = owed(
        schedule.cron,
        zone,
        after=schedule.due_until,
        until=now,
        missed=schedule.missed,
        missed_after_s=settings.missed_after_s,
    )
    if not found.runs and found.let_go is None:
        return
    with database.transaction() as session:
        if not advance_schedule(session, schedule, until=now):
            return
        if found.let_go is not None:
            since = schedule.due_until.astimezone(zone)
            told = (
                f"missed: nobody looked in time, for this or any due time before it since {since:%Y-%m-%d %H:%M %Z} "
                f"(--missed {schedule.missed.value})"
            )
            insert_missed(session, schedule.id, found.let_go, told=told)
        insert_runs(session, schedule.id, found.runs)
    if found.let_go is not None:
        metrics.SCHEDULE_RUNS.add(1, schedule=schedule.name, outcome=RunState.SKIPPED.value)
        log.warning("schedule_missed", schedule=schedule.name, last=str(found.let_go.astimezone(zone)))


def run_schedule(database: Database, run_id: int, *, execute: Execute, settings: ScheduleSettings) -> str | None:
    """Carry out a run that waits: a line that says what came of it, None if there was nothing to do.

    Its lease is kept while `execute` works, whose second argument says whether the run is still ours: once it is not,
    the command is to be ended, and what it did is not written. An error of `execute` leaves the run to its lease.
    """
    claimed = _claim(database, run_id, settings=settings)
    if claimed is None or isinstance(claimed, str):
        return claimed
    began = time.monotonic()
    try:
        ran = _batch_of_before(database, claimed)
        if ran is None:
            taken = _taken(claimed)
            with _Lease(database, claimed, lease_s=settings.lease_s) as lease:
                ran = execute(taken, lease.is_ours)
    except BadInput as error:
        ran = Ran(EXIT_USAGE, str(error))
    became = _write(database, claimed, ran, keep_runs=settings.keep_runs)
    due = _local(claimed.due_at, claimed.schedule.timezone)
    return f"{claimed.schedule.name} due {due:%Y-%m-%d %H:%M %Z}: {became}, after {time.monotonic() - began:.1f} s"


def _claim(database: Database, run_id: int, *, settings: ScheduleSettings) -> ClaimedRun | str | None:
    """The run, claimed; what is to be said of one that was skipped; None of one that is another's, or has to wait."""
    with database.transaction() as session:
        schedule = hold_schedule_of(session, run_id)
        if schedule is None:
            return None
        if schedule.overlap is Overlap.ALLOW or not is_behind(session, run_id):
            return _counted(claim_run(session, run_id, schedule, lease_s=settings.lease_s))
        if schedule.overlap is Overlap.WAIT or not skip_run(session, run_id, told=f"{_BEHIND} (--overlap skip)"):
            return None
        prune_runs(session, schedule.id, keep=settings.keep_runs)
    metrics.SCHEDULE_RUNS.add(1, schedule=schedule.name, outcome=RunState.SKIPPED.value)
    log.warning("schedule_run_skipped", schedule=schedule.name, run=run_id)
    return f"{schedule.name}: skipped, as {_BEHIND}"


def _counted(run: ClaimedRun | None) -> ClaimedRun | None:
    if run is not None and run.tries == 1 and not run.asked_for:
        metrics.SCHEDULE_LATE.observe((run.started_at - run.due_at).total_seconds())
    return run


def _batch_of_before(database: Database, run: ClaimedRun) -> Ran | None:
    """What a submit of an earlier try made before its worker died, so that it is not even tried again."""
    if run.fence == 1 or run.schedule.command[:1] != [SUBMIT]:
        return None
    batch_id = _batch_of(database, run)
    return None if batch_id is None else Ran(0, "its batch was stored by an earlier try", batch_id)


def _batch_of(database: Database, run: ClaimedRun) -> UUID | None:
    with database.transaction() as session:
        return batch_of_key(session, _key(run.id), tenant=run.schedule.tenant)


def _key(run_id: int) -> str:
    return f"schedule-run-{run_id}"


def _taken(run: ClaimedRun) -> TakenRun:
    schedule = run.schedule
    due = run.due_at.astimezone(zone_of(schedule.timezone))
    command = filled_in(schedule.command, due)
    if command[:1] == [SUBMIT]:
        command = [SUBMIT, KEY_OPTION, _key(run.id), *command[1:]]
    return TakenRun(run.id, run.fence, schedule.name, schedule.tenant, command, schedule.folder, due)


def filled_in(command: Sequence[str], due: datetime) -> list[str]:
    """The command with `{due:%Y-%m-%d}` and the like replaced by the due time."""
    return [_DUE.sub(lambda found: due.strftime(found[1]), word) for word in command]


def has_slots(command: Sequence[str]) -> bool:
    """Whether due times are to be filled in."""
    return any(_DUE.search(word) for word in command)


class _Lease:
    """Keeps a run's lease from a thread; ours until another has it, or until it ran out unheard."""

    def __init__(self, database: Database, run: ClaimedRun, *, lease_s: float) -> None:
        self._run = run
        self._lease_s = lease_s
        beat_s = lease_s / BEATS_A_LEASE
        self._heartbeat = Heartbeat(database, lease_s=lease_s, interval_s=beat_s, extend=extend_run_leases)
        self._lost = threading.Event()
        self._kept_at = time.monotonic()

    def __enter__(self) -> _Lease:
        self._heartbeat.add(self._run, self._on_beat)
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._heartbeat.__exit__(None, None, None)

    def is_ours(self) -> bool:
        """Whether nobody else can have it."""
        return not self._lost.is_set() and time.monotonic() - self._kept_at < self._lease_s

    def _on_beat(self, is_ours: bool | None) -> None:
        if is_ours:
            self._kept_at = time.monotonic()
        else:
            self._lost.set()


def _write(database: Database, run: ClaimedRun, ran: Ran, *, keep_runs: int) -> str:
    """Write what became of a run, under its fence; in a word or two."""
    schedule = run.schedule
    told = ran.told[-TOLD_CHARACTERS:].replace("\x00", "").encode(errors="replace").decode()  # as Postgres takes it
    if ran.given_back:
        return _give_back(database, run, told=told, tries=run.tries - 1, sent_at=None)
    batch_id = ran.batch_id
    if batch_id is None and schedule.command[:1] == [SUBMIT]:
        batch_id = _batch_of(database, run)  # a command that was killed may have said nothing of what it stored
    if ran.exit_code == EXIT_UNREACHABLE and batch_id is None and run.tries < MOST_TRIES:
        return _give_back(database, run, told=told, tries=run.tries, sent_at=utc_now())
    state = RunState.SUCCEEDED if ran.exit_code == 0 or batch_id is not None else RunState.FAILED
    with database.transaction() as session:
        if not end_run(session, run, state, exit_code=ran.exit_code, batch_id=batch_id, told=told):
            return _lost(run)
        prune_runs(session, schedule.id, keep=keep_runs)
    metrics.SCHEDULE_RUNS.add(1, schedule=schedule.name, outcome=state.value)
    if state is RunState.SUCCEEDED:
        metrics.SCHEDULE_SUCCESS.set(time.time(), schedule=schedule.name)
    else:
        log.warning("schedule_run_failed", schedule=schedule.name, run=run.id, exit_code=ran.exit_code)
    batch = "" if batch_id is None else f", {batch_name(batch_id)}"
    return f"{state.value}{batch}" if ran.exit_code == 0 else f"{state.value} (exit code {ran.exit_code}){batch}"


def _give_back(database: Database, run: ClaimedRun, *, told: str, tries: int, sent_at: datetime | None) -> str:
    with database.transaction() as session:
        given = give_back_run(session, run, told=told, tries=tries, sent_at=sent_at)
    return "given back, to be run again" if given else _lost(run)


def _lost(run: ClaimedRun) -> str:
    log.warning("schedule_run_lost", schedule=run.schedule.name, run=run.id)
    return "lost: another worker has it, or the schedule was removed"


def _local(moment: datetime, timezone: str) -> datetime:
    """In the zone; in UTC where this machine does not know it."""
    try:
        return moment.astimezone(zone_of(timezone))
    except BadInput:
        return moment.astimezone(UTC)


def schedules_of(database: Database, tenant: str, *, now: datetime) -> list[ScheduleView]:
    """The tenant's schedules by name, each with its next due time and its last run."""
    with database.transaction() as session:
        schedules = schedules_of_tenant(session, tenant=tenant)
        last = last_runs(session, [schedule.id for schedule in schedules])
        batches = _batches_of(session, list(last.values()), tenant)
    return [_view(schedule, last.get(schedule.id), batches, now) for schedule in schedules]


def runs_of(database: Database, schedule: StoredSchedule, *, limit: int) -> list[RunView]:
    """The newest runs of a schedule, the newest first."""
    with database.transaction() as session:
        runs = latest_runs(session, schedule.id, limit=limit)
        batches = _batches_of(session, runs, schedule.tenant)
    return [_run_view(run, schedule, batches) for run in runs]


def _batches_of(session: Session, runs: Sequence[RunRow], tenant: str) -> dict[UUID, BatchProgress]:
    return progress_of_batches(session, [run.batch_id for run in runs if run.batch_id is not None], tenant=tenant)


def _view(
    schedule: StoredSchedule, last: RunRow | None, batches: dict[UUID, BatchProgress], now: datetime
) -> ScheduleView:
    view = ScheduleView(schedule, None, None, None if last is None else _run_view(last, schedule, batches))
    try:
        zone = zone_of(schedule.timezone)
    except BadInput:  # another machine knows it
        return view
    first = next(due_times(schedule.cron, zone, after=schedule.due_until), None)
    coming = next(due_times(schedule.cron, zone, after=now), None)
    return replace(
        view,
        next_at=None if coming is None else coming.astimezone(zone),
        overdue_since=first.astimezone(zone) if first is not None and first <= now else None,
    )


def _run_view(run: RunRow, schedule: StoredSchedule, batches: dict[UUID, BatchProgress]) -> RunView:
    batch = None if run.batch_id is None else batches.get(run.batch_id)
    return RunView(run, _local(run.due_at, schedule.timezone), batch)


def put_schedule(database: Database, new: NewSchedule, *, now: datetime, replace: bool) -> datetime:
    """Store a schedule: when it is due first. Raises BadInput for what is wrong with it, or if its name is taken."""
    if not _NAME.fullmatch(new.name):
        raise BadInput(
            f"{new.name!r:.80} is no name of a schedule: write 1 to 64 of a-z, 0-9 and -, such as nightly-report"
        )
    if new.missed is Missed.ALL and new.overlap is Overlap.SKIP:
        raise BadInput(
            "--missed all runs several at once, which --overlap skip would skip: take --overlap wait or allow"
        )
    zone = zone_of(new.timezone)
    first = checked_cron(new.cron, zone, after=now)
    with database.transaction() as session:
        if replace:
            replace_schedule(session, new)
        elif not add_schedule(session, new):
            raise BadInput(f"there is a schedule {new.name} already; --replace puts this one in its place")
    return first.astimezone(zone)
