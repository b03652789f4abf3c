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

from models.messages import RunSchedule
from models.names import batch_name
from models.states import Missed, Overlap, RunState
from pipeline.begin import TENANT
from pipeline.due_times import Owed, checked_cron, due_times, owed, zone_of
from pipeline.heartbeat import Heartbeat
from runtime import metrics
from runtime.errors import EXIT_UNREACHABLE, EXIT_USAGE, BadInput, ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import ScheduleSettings
from store.batches import BatchProgress, progress_of_batches
from store.database import Database, Session
from store.schedules import (
    ClaimedRun,
    NewSchedule,
    RunRow,
    SentRun,
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
    put_off_run,
    replace_schedule,
    runs_to_send,
    schedules_of_all,
    schedules_of_tenant,
    skip_run,
    take_back_runs,
    waiting_runs,
)
from store.submissions import batch_of_key

log = get_logger(__name__)

BEATS_A_LEASE: Final = 3  # two may be missed
MOST_TRIES: Final = 3  # of a run whose worker dies, or whose services do not answer
MOST_WAITING: Final = 100  # runs of a schedule, as many as one look makes of what was missed
WRITE_AGAIN_S: Final = 1.0
TOLD_CHARACTERS: Final = 4_000
SUBMIT: Final = "submit"
KEY_OPTION: Final = "--idempotency-key"
_BEHIND: Final = "the run before it, or its batch, had not ended"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_DUE = re.compile(r"\{due:([^{}]*%[^{}]*)\}")


@dataclass(frozen=True, slots=True)
class TakenRun:
    """A run to be carried out: the command line after `stoker`, filled in, and where it is run."""

    command: list[str]
    folder: str


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of the command; `told` is the end of what it said. `given_back`: it was ended, to begin again.

    Without an exit code nobody saw it end.
    """

    exit_code: int | None
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


def look(database: Database, *, settings: ScheduleSettings, now: datetime | None = None) -> list[RunSchedule]:
    """Make runs of what is due, take back those of dead workers: the hints that are to be sent now.

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
        taken_back = take_back_runs(session, lease_s=settings.lease_s)
    for run_id, name in taken_back:
        log.warning("schedule_run_taken_back", schedule=name, run=run_id)
    with database.transaction() as session:
        sent = runs_to_send(session, now=moment)
    metrics.SCHEDULE_LOOK.set(time.time())
    return [_hint(run, sent_at=moment) for run in sent]


def _hint(run: SentRun, *, sent_at: datetime) -> RunSchedule:
    due = _local(run.due_at, run.timezone)
    return RunSchedule(
        run_id=run.id,
        schedule=run.schedule,
        due_at=due.isoformat(timespec="minutes"),
        sent_at=sent_at.isoformat(timespec="milliseconds"),
    )


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
        room = max(MOST_WAITING - waiting_runs(session, schedule.id), 0)
        missed = _missed(schedule, found, room=room)
        for due_at, told in missed:
            insert_missed(session, schedule.id, due_at, told=told)
        insert_runs(session, schedule.id, found.runs[:room])  # after them: the newest run is the one that is shown
        if missed:  # else a schedule whose runs wait for ever would have a row of each due time
            prune_runs(session, schedule.id, keep=settings.keep_runs)
    for due_at, told in missed:
        metrics.SCHEDULE_RUNS.add(1, schedule=schedule.name, outcome=RunState.SKIPPED.value)
        log.warning("schedule_missed", schedule=schedule.name, last=str(due_at.astimezone(zone)), why=told)


def _missed(schedule: StoredSchedule, found: Owed, *, room: int) -> list[tuple[datetime, str]]:
    """The last due time of those that are let go, for each reason that there is, and what is said of it."""
    missed = []
    if found.let_go is not None:
        since = _local(schedule.due_until, schedule.timezone)
        told = (
            f"missed: nobody looked in time, for this or any due time before it since {since:%Y-%m-%d %H:%M %Z} "
            f"(--missed {schedule.missed.value})"
        )
        missed.append((found.let_go, told))
    if found.runs[room:]:
        since = _local(found.runs[room], schedule.timezone)
        told = f"missed: {MOST_WAITING} runs of it wait already, so none is made from {since:%Y-%m-%d %H:%M %Z} to now"
        missed.append((found.runs[-1], told))
    return missed


def run_schedule(database: Database, hint: RunSchedule, *, execute: Execute, settings: ScheduleSettings) -> str | None:
    """Carry out a run that waits: a line that says what came of it, None if there was nothing to do.

    Its lease is kept until its outcome is written. The second argument of `execute` says whether the run is still ours:
    once it is not, the command is to be ended, and what it did is not written. An error of `execute` leaves the run to
    its lease.
    """
    claimed = _claim(database, hint.run_id, settings=settings)
    if claimed is None or isinstance(claimed, str):
        return claimed
    if (late := late_s(claimed, hint)) is not None:
        metrics.SCHEDULE_LATE.observe(late)
    began = time.monotonic()
    with _Lease(database, claimed, lease_s=settings.lease_s) as lease:
        ran = _ran(database, claimed, execute, lease.is_ours)
        became = _write_patiently(database, claimed, ran, keep_runs=settings.keep_runs, patience=lease.is_ours)
    return f"{became}, after {time.monotonic() - began:.1f} s"


def _claim(database: Database, run_id: int, *, settings: ScheduleSettings) -> ClaimedRun | str | None:
    """The run, claimed; what is to be said of one that was skipped; None of one that is another's, or has to wait."""
    with database.transaction() as session:
        schedule = hold_schedule_of(session, run_id)
        if schedule is None:
            return None
        if schedule.overlap is Overlap.ALLOW or not is_behind(session, run_id):
            return claim_run(session, run_id, schedule, lease_s=settings.lease_s)
        if schedule.overlap is Overlap.WAIT or not skip_run(session, run_id, told=f"{_BEHIND} (--overlap skip)"):
            return None
        prune_runs(session, schedule.id, keep=settings.keep_runs)
    metrics.SCHEDULE_RUNS.add(1, schedule=schedule.name, outcome=RunState.SKIPPED.value)
    log.warning("schedule_run_skipped", schedule=schedule.name, run=run_id)
    return f"{schedule.name}: skipped, as {_BEHIND}"


def late_s(run: ClaimedRun, hint: RunSchedule) -> float | None:
    """How long a run waited for a worker after its hint was sent; None of one that has begun before."""
    if run.fence > 1:
        return None
    return max((run.started_at - datetime.fromisoformat(hint.sent_at)).total_seconds(), 0.0)


def _ran(database: Database, run: ClaimedRun, execute: Execute, is_ours: IsOurs) -> Ran:
    """What became of its command, or why that is not run: it was, it died too often, or it cannot be."""
    try:
        _expect_local(run.schedule.tenant)
        before = _batch_of_before(database, run)
        if before is not None:
            return before
        if run.tries > MOST_TRIES:
            return Ran(None, f"its worker died at try {MOST_TRIES}, the last; see the log of the control workers")
        return execute(_taken(run), is_ours)
    except BadInput as error:
        return Ran(EXIT_USAGE, str(error))


def _expect_local(tenant: str) -> None:
    if tenant != TENANT:
        raise BadInput(
            f"a schedule's command runs as the tenant {TENANT}, who is at this machine: there can be none of {tenant!r}"
        )


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
    return TakenRun(command, schedule.folder)


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


def _write_patiently(database: Database, run: ClaimedRun, ran: Ran, *, keep_runs: int, patience: IsOurs) -> str:
    """As `_write`, again and again while Postgres is away, as a command is not to be run twice for that."""
    while True:
        try:
            return _write(database, run, ran, keep_runs=keep_runs)
        except ServiceUnreachable as error:
            if not patience():
                raise
            log.warning("schedule_write_waits", schedule=run.schedule.name, run=run.id, error=str(error))
            time.sleep(WRITE_AGAIN_S)


def _write(database: Database, run: ClaimedRun, ran: Ran, *, keep_runs: int) -> str:
    """Write what became of a run, under its fence; in a word or two."""
    schedule = run.schedule
    told = ran.told[-TOLD_CHARACTERS:].replace("\x00", "").encode(errors="replace").decode()  # as Postgres takes it
    if ran.given_back:
        with database.transaction() as session:
            return _given_back(run, give_back_run(session, run, told=told))
    batch_id = ran.batch_id
    if batch_id is None and schedule.command[:1] == [SUBMIT]:
        batch_id = _batch_of(database, run)  # a command that was killed may have said nothing of what it stored
    if ran.exit_code == EXIT_UNREACHABLE and batch_id is None and run.tries < MOST_TRIES:
        with database.transaction() as session:
            return _given_back(run, put_off_run(session, run, told=told))
    state = RunState.SUCCEEDED if ran.exit_code == 0 or batch_id is not None else RunState.FAILED
    tries = min(run.tries, MOST_TRIES)  # the one after them only ends it
    with database.transaction() as session:
        if not end_run(session, run, state, tries=tries, exit_code=ran.exit_code, batch_id=batch_id, told=told):
            return _lost(run)
        prune_runs(session, schedule.id, keep=keep_runs)
    metrics.SCHEDULE_RUNS.add(1, schedule=schedule.name, outcome=state.value)
    if state is RunState.SUCCEEDED:
        metrics.SCHEDULE_SUCCESS.set(time.time(), schedule=schedule.name)
    else:
        log.warning("schedule_run_failed", schedule=schedule.name, run=run.id, exit_code=ran.exit_code)
    batch = "" if batch_id is None else f", {batch_name(batch_id)}"
    return f"{state.value} (exit code {ran.exit_code}){batch}" if ran.exit_code else f"{state.value}{batch}"


def _given_back(run: ClaimedRun, given: bool) -> str:
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


def put_schedule(database: Database, new: NewSchedule, *, now: datetime) -> None:
    """Store a schedule. Raises BadInput for what is wrong with it, or if its name is taken."""
    _check(new, now=now)
    with database.transaction() as session:
        if not add_schedule(session, new):
            raise BadInput(f"there is a schedule {new.name} already; --replace puts this one in its place")


def change_schedule(database: Database, new: NewSchedule, *, now: datetime) -> None:
    """Store a schedule in the place of the one of its name, if there is one. Raises BadInput for what is wrong."""
    _check(new, now=now)
    with database.transaction() as session:
        replace_schedule(session, new)


def _check(new: NewSchedule, *, now: datetime) -> None:
    _expect_local(new.tenant)
    if not _NAME.fullmatch(new.name):
        raise BadInput(
            f"{new.name!r:.80} is no name of a schedule: write 1 to 64 of a-z, 0-9 and -, such as nightly-report"
        )
    if new.missed is Missed.ALL and new.overlap is Overlap.SKIP:
        raise BadInput(
            "--missed all runs several at once, which --overlap skip would skip: take --overlap wait or allow"
        )
    checked_cron(new.cron, zone_of(new.timezone), after=now)
