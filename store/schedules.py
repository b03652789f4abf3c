"""SQL of schedules and their runs: due times become runs, a run is claimed under a fence, ended or taken back.

Functions take a session and never commit. Locks are taken in one order: schedule, then its runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import TERMINAL, Missed, Overlap, RunState

HINTS_AT_ONCE = 100
RESEND_AFTER_S = 60.0  # a hint that was lost with the broker; a second one does no harm

_ENDED = {"ended": [state.value for state in TERMINAL]}
_BATCH_IS_LIVE = "EXISTS (SELECT FROM batches WHERE batches.id = {run}.batch_id AND state <> ALL(:ended))"
# Whether a run before this one, or its batch, has not ended.
_IS_BEHIND = f"""EXISTS (SELECT FROM schedule_runs b WHERE b.schedule_id = r.schedule_id AND b.id < r.id
    AND (b.state IN ('waiting', 'running') OR {_BATCH_IS_LIVE.format(run="b")}))"""


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """A schedule as it is added."""

    tenant: str
    name: str
    cron: str
    timezone: str
    command: Sequence[str]
    folder: str
    missed: Missed
    overlap: Overlap


@dataclass(frozen=True, slots=True)
class StoredSchedule:
    """A row of schedules."""

    id: int
    tenant: str
    name: str
    cron: str
    timezone: str
    command: list[str]
    folder: str
    missed: Missed
    overlap: Overlap
    due_until: datetime


@dataclass(frozen=True, slots=True)
class SentRun:
    """A run whose hint is to be sent now."""

    id: int
    schedule: str
    timezone: str
    due_at: datetime


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run under a fence, and the schedule it is of. `tries` counts this one."""

    id: int
    fence: int
    tries: int
    due_at: datetime
    started_at: datetime
    schedule: StoredSchedule

    @property
    def key(self) -> tuple[int, int]:
        """What tells this attempt from every other."""
        return self.id, self.fence


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as it is listed."""

    id: int
    schedule_id: int
    due_at: datetime
    asked_for: bool
    state: RunState
    tries: int
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    batch_id: UUID | None
    told: str | None


def database_now(session: Session) -> datetime:
    """Postgres's clock: the one that all machines share."""
    now: datetime = session.execute(text("SELECT clock_timestamp()")).scalar_one()
    return now


def add_schedule(session: Session, new: NewSchedule) -> bool:
    """Store a schedule that is due from now on; False if the tenant has one of this name."""
    return _put(session, new, "NOTHING")


def replace_schedule(session: Session, new: NewSchedule) -> None:
    """Store a schedule in place of one of its name. Its runs stay; due times of before too, unless these changed."""
    columns = ("cron", "timezone", "command", "folder", "missed", "overlap")
    sets = ", ".join(f"{name} = excluded.{name}" for name in columns)
    unchanged = "(s.cron, s.timezone) = (excluded.cron, excluded.timezone)"
    _put(session, new, f"UPDATE SET {sets}, due_until = CASE WHEN {unchanged} THEN s.due_until ELSE now() END")


def _put(session: Session, new: NewSchedule, on_conflict: str) -> bool:
    stored = session.scalar(
        text(f"""
        INSERT INTO schedules AS s (tenant, name, cron, timezone, command, folder, missed, overlap, due_until)
        VALUES (:tenant, :name, :cron, :timezone, CAST(:command AS text[]), :folder, :missed, :overlap, now())
        ON CONFLICT (tenant, name) DO {on_conflict} RETURNING s.id"""),
        {
            "tenant": new.tenant,
            "name": new.name,
            "cron": new.cron,
            "timezone": new.timezone,
            "command": list(new.command),
            "folder": new.folder,
            "missed": new.missed.value,
            "overlap": new.overlap.value,
        },
    )
    return stored is not None


def remove_schedule(session: Session, name: str, *, tenant: str) -> bool:
    """Delete a schedule with its runs; one that runs loses its fence. False if there is none."""
    gone = session.scalar(
        text("DELETE FROM schedules WHERE tenant = :tenant AND name = :name RETURNING 1"),
        {"tenant": tenant, "name": name},
    )
    return gone is not None


_SCHEDULE = "s.id, s.tenant, s.name, s.cron, s.timezone, s.command, s.folder, s.missed, s.overlap, s.due_until"


def schedules_of_all(session: Session) -> list[StoredSchedule]:
    """Every tenant's."""
    return [_schedule(row) for row in session.execute(text(f"SELECT {_SCHEDULE} FROM schedules s ORDER BY s.id"))]


def schedules_of_tenant(session: Session, *, tenant: str) -> list[StoredSchedule]:
    """The tenant's, by name."""
    rows = session.execute(
        text(f"SELECT {_SCHEDULE} FROM schedules s WHERE s.tenant = :tenant ORDER BY s.name"), {"tenant": tenant}
    )
    return [_schedule(row) for row in rows]


def advance_schedule(session: Session, seen: StoredSchedule, *, until: datetime) -> bool:
    """Note that the due times up to `until` are seen to; False if another did, or the schedule was changed."""
    row = session.scalar(
        text("""
        UPDATE schedules SET due_until = :until WHERE id = (
            SELECT id FROM schedules WHERE id = :id AND due_until = :seen AND cron = :cron AND timezone = :timezone
            FOR NO KEY UPDATE SKIP LOCKED)
        RETURNING 1"""),
        {"id": seen.id, "seen": seen.due_until, "cron": seen.cron, "timezone": seen.timezone, "until": until},
    )
    return row is not None


def insert_runs(session: Session, schedule_id: int, due_times: Sequence[datetime]) -> None:
    """Runs of these due times, waiting; one that there is stays as it is."""
    for due_at in due_times:
        session.execute(
            text("""
            INSERT INTO schedule_runs (schedule_id, due_at) VALUES (:schedule, :due_at)
            ON CONFLICT (schedule_id, due_at) DO NOTHING"""),
            {"schedule": schedule_id, "due_at": due_at},
        )


def waiting_runs(session: Session, schedule_id: int) -> int:
    """How many runs of a schedule wait."""
    waiting: int = session.execute(
        text("SELECT count(*) FROM schedule_runs WHERE schedule_id = :schedule AND state = 'waiting'"),
        {"schedule": schedule_id},
    ).scalar_one()
    return waiting


def insert_missed(session: Session, schedule_id: int, due_at: datetime, *, told: str) -> None:
    """A due time that was let go, as a skipped run, so that it can be seen."""
    session.execute(
        text("""
        INSERT INTO schedule_runs (schedule_id, due_at, state, told, ended_at)
        VALUES (:schedule, :due_at, 'skipped', :told, clock_timestamp())
        ON CONFLICT (schedule_id, due_at) DO NOTHING"""),
        {"schedule": schedule_id, "due_at": due_at, "told": told},
    )


def ask_run(session: Session, name: str, *, tenant: str) -> int | None:
    """A run that is due now, whatever the schedule says: its id; None if there is no such schedule."""
    run_id: int | None = session.scalar(
        text("""
        INSERT INTO schedule_runs (schedule_id, due_at, asked_for)
        SELECT id, clock_timestamp(), true FROM schedules WHERE tenant = :tenant AND name = :name RETURNING id"""),
        {"tenant": tenant, "name": name},
    )
    return run_id


def take_back_runs(session: Session, *, lease_s: float) -> list[tuple[int, str]]:
    """Let runs whose lease is over wait again: their ids, with the names of their schedules.

    Leases are spared for one lease time after Postgres started; what a write holds waits for the next call.
    """
    rows = session.execute(
        text("""
        UPDATE schedule_runs r SET state = 'waiting', fence = fence + 1, lease_until = NULL, sent_at = NULL,
            told = 'its worker died at try ' || tries
        FROM schedules s
        WHERE s.id = r.schedule_id AND r.id IN (
            SELECT id FROM schedule_runs WHERE state = 'running' AND lease_until < clock_timestamp()
              AND pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => :lease_s)
            ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED)
        RETURNING r.id, s.name"""),
        {"lease_s": lease_s},
    )
    return [(identifier, name) for identifier, name in rows]


def runs_to_send(session: Session, *, now: datetime) -> list[SentRun]:
    """The waiting runs whose hint was not sent, or long ago, noted as sent now; not those that wait for another."""
    rows = session.execute(
        text(f"""
        UPDATE schedule_runs u SET sent_at = :now FROM schedules s
        WHERE s.id = u.schedule_id AND u.id IN (
            SELECT r.id FROM schedule_runs r JOIN schedules o ON o.id = r.schedule_id
            WHERE r.state = 'waiting'
              AND (r.sent_at IS NULL OR r.sent_at < CAST(:now AS timestamptz) - make_interval(secs => :resend_s))
              AND NOT (o.overlap = 'wait' AND {_IS_BEHIND})
            ORDER BY r.id LIMIT :limit FOR UPDATE OF r SKIP LOCKED)
        RETURNING u.id, s.name, s.timezone, u.due_at"""),
        {"now": now, "resend_s": RESEND_AFTER_S, "limit": HINTS_AT_ONCE, **_ENDED},
    )
    return sorted((SentRun(*row) for row in rows), key=lambda run: run.id)


def hold_schedule_of(session: Session, run_id: int) -> StoredSchedule | None:
    """The schedule of a run that waits, held to the end of the transaction: its runs begin one after the other."""
    row = session.execute(
        text(f"""
        SELECT {_SCHEDULE} FROM schedules s
        WHERE s.id = (SELECT schedule_id FROM schedule_runs WHERE id = :run AND state = 'waiting')
        FOR NO KEY UPDATE"""),
        {"run": run_id},
    ).one_or_none()
    return None if row is None else _schedule(row)


def is_behind(session: Session, run_id: int) -> bool:
    """Whether a run before this one, or its batch, has not ended."""
    return bool(
        session.scalar(text(f"SELECT {_IS_BEHIND} FROM schedule_runs r WHERE r.id = :run"), {"run": run_id} | _ENDED)
    )


def claim_run(session: Session, run_id: int, schedule: StoredSchedule, *, lease_s: float) -> ClaimedRun | None:
    """Waiting → running under a new fence; None if another was quicker, or it is gone."""
    row = session.execute(
        text("""
        UPDATE schedule_runs SET state = 'running', fence = fence + 1, tries = tries + 1,
            started_at = clock_timestamp(), lease_until = clock_timestamp() + make_interval(secs => :lease_s)
        WHERE id = :run AND state = 'waiting'
        RETURNING id, fence, tries, due_at, started_at"""),
        {"run": run_id, "lease_s": lease_s},
    ).one_or_none()
    if row is None:
        return None
    identifier, fence, tries, due_at, started_at = row
    return ClaimedRun(identifier, fence, tries, due_at, started_at, schedule)


def extend_run_leases(session: Session, fences: Mapping[int, int], *, lease_s: float) -> dict[int, bool]:
    """Keep these runs (id → fence): those that are still ours."""
    rows = session.scalars(
        text("""
        UPDATE schedule_runs r SET lease_until = clock_timestamp() + make_interval(secs => :lease_s)
        FROM unnest(CAST(:ids AS int8[]), CAST(:fences AS int8[])) AS held (id, fence)
        WHERE r.id = held.id AND r.fence = held.fence AND r.state = 'running' RETURNING r.id"""),
        {"ids": list(fences), "fences": list(fences.values()), "lease_s": lease_s},
    )
    return dict.fromkeys(rows, True)


def end_run(
    session: Session,
    run: ClaimedRun,
    state: RunState,
    *,
    tries: int,
    exit_code: int | None,
    batch_id: UUID | None,
    told: str,
) -> bool:
    """Running → succeeded or failed, under its fence; False if that is lost. The next that waits is sent at once."""
    ours = session.scalar(
        text("""
        UPDATE schedule_runs SET state = :state, fence = fence + 1, lease_until = NULL, ended_at = clock_timestamp(),
            tries = :tries, exit_code = :exit_code, batch_id = :batch_id, told = :told
        WHERE id = :run AND fence = :fence AND state = 'running' RETURNING 1"""),
        {
            "run": run.id,
            "fence": run.fence,
            "state": state.value,
            "tries": tries,
            "exit_code": exit_code,
            "batch_id": batch_id,
            "told": told,
        },
    )
    return ours is not None


def give_back_run(session: Session, run: ClaimedRun, *, told: str) -> bool:
    """Running → waiting, to begin again at once, as if not tried; under its fence, False if that is lost."""
    return _let_wait(session, run, "tries = tries - 1, sent_at = NULL", told=told)


def put_off_run(session: Session, run: ClaimedRun, *, told: str) -> bool:
    """Running → waiting, its next hint after RESEND_AFTER_S; under its fence, False if that is lost."""
    return _let_wait(session, run, "sent_at = clock_timestamp()", told=told)


def _let_wait(session: Session, run: ClaimedRun, sets: str, *, told: str) -> bool:
    ours = session.scalar(
        text(f"""
        UPDATE schedule_runs SET state = 'waiting', fence = fence + 1, lease_until = NULL, told = :told, {sets}
        WHERE id = :run AND fence = :fence AND state = 'running' RETURNING 1"""),
        {"run": run.id, "fence": run.fence, "told": told},
    )
    return ours is not None


def skip_run(session: Session, run_id: int, *, told: str) -> bool:
    """Waiting → skipped; False if it waits no more."""
    skipped = session.scalar(
        text("""
        UPDATE schedule_runs SET state = 'skipped', ended_at = clock_timestamp(), told = :told
        WHERE id = :run AND state = 'waiting' RETURNING 1"""),
        {"run": run_id, "told": told},
    )
    return skipped is not None


def prune_runs(session: Session, schedule_id: int, *, keep: int) -> None:
    """Forget all but the newest runs; those that have not ended stay, and those whose batch has not."""
    session.execute(
        text(f"""
        DELETE FROM schedule_runs r WHERE schedule_id = :schedule AND state NOT IN ('waiting', 'running')
          AND id < (SELECT min(id) FROM (
              SELECT id FROM schedule_runs WHERE schedule_id = :schedule ORDER BY id DESC LIMIT :keep) newest)
          AND NOT {_BATCH_IS_LIVE.format(run="r")}"""),
        {"schedule": schedule_id, "keep": keep, **_ENDED},
    )


_RUN = (
    "r.id, r.schedule_id, r.due_at, r.asked_for, r.state, r.tries, r.started_at, r.ended_at, r.exit_code, r.batch_id, "
    "r.told"
)


def latest_runs(session: Session, schedule_id: int, *, limit: int) -> list[RunRow]:
    """The newest runs of a schedule, the newest first."""
    rows = session.execute(
        text(f"SELECT {_RUN} FROM schedule_runs r WHERE r.schedule_id = :schedule ORDER BY r.id DESC LIMIT :limit"),
        {"schedule": schedule_id, "limit": limit},
    )
    return [_run(row) for row in rows]


def last_runs(session: Session, schedule_ids: Sequence[int]) -> dict[int, RunRow]:
    """The newest run of each schedule that has one."""
    rows = session.execute(
        text(f"""
        SELECT DISTINCT ON (r.schedule_id) {_RUN} FROM schedule_runs r
        WHERE r.schedule_id = ANY(CAST(:ids AS int8[])) ORDER BY r.schedule_id, r.id DESC"""),
        {"ids": list(schedule_ids)},
    )
    return {run.schedule_id: run for run in map(_run, rows)}


def _schedule(row: Any) -> StoredSchedule:
    found: dict[str, Any] = dict(row._mapping)
    return StoredSchedule(**{**found, "missed": Missed(found["missed"]), "overlap": Overlap(found["overlap"])})


def _run(row: Any) -> RunRow:
    found: dict[str, Any] = dict(row._mapping)
    return RunRow(**{**found, "state": RunState(found["state"])})
