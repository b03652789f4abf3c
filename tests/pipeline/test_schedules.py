"""Schedules on real Postgres: one run a due time, one process a run, one batch a submit, whoever dies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from models.lines import SubmitOptions
from models.messages import RunSchedule
from models.states import Missed, Overlap, RunState
from pipeline import schedules
from pipeline.schedules import (
    IsOurs,
    Ran,
    TakenRun,
    change_schedule,
    late_s,
    look,
    put_schedule,
    run_schedule,
    runs_of,
    schedules_of,
)
from pipeline.submit import submit_file
from runtime.errors import EXIT_UNREACHABLE, BadInput
from runtime.settings import ScheduleSettings, Settings
from store.database import Database
from store.schedules import RESEND_AFTER_S, ClaimedRun, NewSchedule, ask_run, database_now, remove_schedule
from tests.support.batches import chats, execute, rows, store_batch

SETTINGS = ScheduleSettings(lease_s=1)  # also how long Postgres must have been up for a run to be taken back
NOW = datetime(2026, 6, 1, 0, 2, tzinfo=UTC)  # 02:02 in Berlin
RAN = Ran(0, "done")


def put(database: Database, name: str = "nightly", *command: str, ago: float = 600.0, **changed: Any) -> None:
    """A schedule of 02:00 in Berlin that was last looked at so many seconds before NOW."""
    fields: dict[str, Any] = {
        "tenant": "local",
        "name": name,
        "cron": "0 2 * * *",
        "timezone": "Europe/Berlin",
        "command": command or ("purge", "--older-than", "30d"),
        "folder": "/",
        "missed": Missed.ONCE,
        "overlap": Overlap.SKIP,
    }
    put_schedule(database, NewSchedule(**(fields | changed)), now=NOW)
    execute(
        database,
        "UPDATE schedules SET due_until = :until WHERE name = :name",
        until=NOW - timedelta(seconds=ago),
        name=name,
    )


def looked(database: Database, *, days: int = 0, seconds: float = 0) -> list[RunSchedule]:
    return look(database, settings=SETTINGS, now=NOW + timedelta(days=days, seconds=seconds))


def ran(database: Database, run: RunSchedule, became: Ran = RAN, settings: ScheduleSettings = SETTINGS) -> str | None:
    return run_schedule(database, run, execute=lambda _, __: became, settings=settings)


def states(database: Database) -> list[str]:
    return [state for (state,) in rows(database, "SELECT state FROM schedule_runs ORDER BY id")]


def die(database: Database) -> None:
    """End the leases of the runs that nobody keeps."""
    execute(database, "UPDATE schedule_runs SET lease_until = now() - interval '1 s' WHERE state = 'running'")


class Died(BaseException):
    """Stands for a process that ended in the middle."""


def dies(taken: TakenRun, is_ours: IsOurs) -> Ran:
    raise Died


def begun(database: Database, run: RunSchedule) -> None:
    """Claimed by a process that then died."""
    with pytest.raises(Died):
        run_schedule(database, run, execute=dies, settings=SETTINGS)


def test_a_due_time_is_run_once_with_its_command_in_its_folder_and_zone(database: Database) -> None:
    put(database, "nightly", "submit", "q-{due:%Y-%m-%d}.jsonl", "--set", "x={due}", folder="/srv")
    (run,) = looked(database)
    assert (run.schedule, run.due_at) == ("nightly", "2026-06-01T02:00+02:00")
    assert looked(database) == []
    seen: list[TakenRun] = []

    def execute_it(taken: TakenRun, is_ours: IsOurs) -> Ran:
        assert is_ours()
        assert run_schedule(database, run, execute=dies, settings=SETTINGS) is None  # it is ours alone
        seen.append(taken)
        return Ran(0, "stored")

    said = run_schedule(database, run, execute=execute_it, settings=SETTINGS)
    assert said is not None and said.startswith("succeeded, after 0.")
    (taken,) = seen
    key = f"schedule-run-{run.run_id}"
    assert taken.command == ["submit", "--idempotency-key", key, "q-2026-06-01.jsonl", "--set", "x={due}"]
    assert taken.folder == "/srv"
    assert ran(database, run) is None
    assert [after.due_at for after in looked(database, days=1)] == ["2026-06-02T02:00+02:00"]


def test_of_many_who_look_at_once_one_sends_the_hint(database: Database) -> None:
    for number in range(5):
        put(database, f"s{number}", cron="* * * * *", overlap=Overlap.ALLOW, ago=299)
    with ThreadPoolExecutor(8) as pool:
        found = [run for runs in pool.map(lambda _: looked(database), range(16)) for run in runs]
    assert len(found) == len({run.run_id for run in found}) == 25
    assert len(states(database)) == 25
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: ran(database, found[0]), range(4)))
    assert len([line for line in told if line is not None]) == 1


def test_a_hint_that_was_lost_is_sent_again_after_a_minute(database: Database) -> None:
    put(database)
    (first,) = looked(database)
    assert looked(database, seconds=59) == []
    assert [again.run_id for again in looked(database, seconds=61)] == [first.run_id]


def test_a_run_whose_worker_died_is_run_again_three_times_at_most(database: Database) -> None:
    put(database)
    for _ in range(schedules.MOST_TRIES):
        (run,) = looked(database, seconds=100)
        begun(database, run)
        assert looked(database, seconds=0) == []  # its lease holds
        die(database)
    (run,) = looked(database, seconds=100)
    assert run_schedule(database, run, execute=dies, settings=SETTINGS) is not None
    assert rows(database, "SELECT state, tries, exit_code, told FROM schedule_runs") == [
        ("failed", 3, None, "its worker died at try 3, the last; see the log of the control workers")
    ]


def test_an_outcome_is_written_though_postgres_is_away_for_a_moment(database: Database, postgres_url: str) -> None:
    put(database)
    (run,) = looked(database)
    name = str(conninfo_to_dict(postgres_url)["dbname"])
    elsewhere = psycopg.connect(make_conninfo(postgres_url, dbname="postgres"), autocommit=True)

    def let_in(allowed: bool) -> None:
        statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(sql.Identifier(name), allowed)
        elsewhere.execute(statement)

    def goes_away(taken: TakenRun, is_ours: IsOurs) -> Ran:
        let_in(False)
        elsewhere.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        back.start()
        return RAN

    back = threading.Timer(0.2, let_in, [True])
    with elsewhere:
        try:
            said = run_schedule(database, run, execute=goes_away, settings=ScheduleSettings(lease_s=30))
        finally:
            back.join()
    assert said is not None and "succeeded" in said
    assert states(database) == ["succeeded"]


def test_what_a_worker_writes_after_another_took_over_is_not_written(database: Database) -> None:
    put(database)
    (run,) = looked(database)

    def too_late(taken: TakenRun, is_ours: IsOurs) -> Ran:
        die(database)
        (again,) = looked(database, seconds=100)
        assert ran(database, again, Ran(0, "the second")) is not None
        return Ran(1, "the first")

    said = run_schedule(database, run, execute=too_late, settings=SETTINGS)
    assert said is not None and "lost" in said
    assert rows(database, "SELECT state, told, fence FROM schedule_runs") == [("succeeded", "the second", 4)]


def test_a_command_learns_that_its_schedule_was_removed(database: Database) -> None:
    put(database)
    (run,) = looked(database)

    def until_lost(taken: TakenRun, is_ours: IsOurs) -> Ran:
        with database.transaction() as session:
            assert remove_schedule(session, "nightly", tenant="local")
        while is_ours():
            pass
        return Ran(-9, "killed")

    settings = ScheduleSettings(lease_s=0.2)
    said = run_schedule(database, run, execute=until_lost, settings=settings)
    assert said is not None and "lost" in said
    assert states(database) == []


def test_a_run_given_back_or_without_services_waits_again(database: Database) -> None:
    put(database)
    (run,) = looked(database)
    assert "given back" in str(ran(database, run, Ran(-15, "drained", given_back=True)))
    assert looked(database) == [run]  # at once, and it counts as no try
    for _ in range(schedules.MOST_TRIES - 1):
        assert "given back" in str(ran(database, run, Ran(EXIT_UNREACHABLE, "no Postgres")))
        assert run.run_id not in looked_after(database, RESEND_AFTER_S - 1)
        assert run.run_id in looked_after(database, RESEND_AFTER_S + 1)
    assert "failed (exit code 3)" in str(ran(database, run, Ran(EXIT_UNREACHABLE, "no Postgres")))
    told = rows(database, "SELECT tries, exit_code, told FROM schedule_runs WHERE id = :run", run=run.run_id)
    assert told == [(3, 3, "no Postgres")]


def looked_after(database: Database, seconds: float) -> list[int]:
    """The runs whose hints a look so long after now sends."""
    with database.transaction() as session:
        now = database_now(session)
    return [run.run_id for run in look(database, settings=SETTINGS, now=now + timedelta(seconds=seconds))]


@pytest.mark.parametrize("end", ["dies", "dies at the last try", "is killed"])
def test_a_submit_that_is_cut_off_after_it_stored_makes_no_second_batch(
    database: Database, tmp_path: Path, end: str
) -> None:
    put(database, "nightly", "submit", "x.jsonl")
    (run,) = looked(database)
    stored: list[UUID] = []

    def stores(taken: TakenRun, is_ours: IsOurs) -> Ran:
        stored.append(submitted(database, tmp_path, key=taken.command[2]))
        if end != "is killed":
            raise Died
        return Ran(-9, "killed before it could say what it stored")

    if end == "dies at the last try":
        execute(database, "UPDATE schedule_runs SET tries = :most - 1", most=schedules.MOST_TRIES)
    if end != "is killed":
        with pytest.raises(Died):
            run_schedule(database, run, execute=stores, settings=SETTINGS)
        die(database)
        (tmp_path / "x.jsonl").write_text("changed meanwhile")
        (again,) = looked(database, seconds=3 * 3600)  # nobody was there for hours
        assert run_schedule(database, again, execute=dies, settings=SETTINGS) is not None
    else:
        run_schedule(database, run, execute=stores, settings=SETTINGS)
    assert rows(database, "SELECT state, batch_id FROM schedule_runs") == [("succeeded", stored[0])]
    assert rows(database, "SELECT count(*) FROM batches") == [(1,)]


def submitted(database: Database, folder: Path, *, key: str) -> UUID:
    (folder / "x.jsonl").write_text(
        '{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":'
        '{"model":"m","messages":[{"role":"user","content":"hello"}]}}\n'
    )
    return submit_file(
        database,
        folder / "x.jsonl",
        options=SubmitOptions(max_output_tokens=8),
        settings=Settings(_env_file=None),
        served_models=None,
        reuse=True,
        key=key,
    ).batch_id


def test_two_runs_of_a_submit_make_two_batches(database: Database, tmp_path: Path) -> None:
    put(database, "nightly", "submit", "x.jsonl", overlap=Overlap.ALLOW)

    def stores(taken: TakenRun, is_ours: IsOurs) -> Ran:
        return Ran(0, "", submitted(database, tmp_path, key=taken.command[2]))

    for days in range(2):
        (run,) = looked(database, days=days)
        run_schedule(database, run, execute=stores, settings=SETTINGS)
    assert rows(database, "SELECT count(*) FROM batches") == [(2,)]


Overlapping = Callable[[Overlap], tuple[UUID, RunSchedule]]


@pytest.fixture
def overlapping(database: Database, tmp_path: Path) -> Overlapping:
    """A run whose batch has not ended, and the one that is due after it."""

    def made(overlap: Overlap) -> tuple[UUID, RunSchedule]:
        put(database, overlap=overlap)
        (first,) = looked(database)
        batch_id = store_batch(database, tmp_path, chats(1))
        ran(database, first, Ran(0, "stored", batch_id))
        found = looked(database, days=1)
        assert len(found) == (0 if overlap is Overlap.WAIT else 1)
        (second,) = rows(database, "SELECT max(id) FROM schedule_runs")
        return batch_id, RunSchedule(
            run_id=second[0], schedule="nightly", due_at=NOW.isoformat(), sent_at=NOW.isoformat()
        )

    return made


def test_a_run_is_skipped_while_the_batch_before_it_has_not_ended(database: Database, overlapping: Overlapping) -> None:
    batch_id, second = overlapping(Overlap.SKIP)
    assert "skipped" in str(ran(database, second))
    end_batch(database, batch_id)
    (third,) = looked(database, days=2)
    assert "succeeded" in str(ran(database, third))
    assert states(database) == ["succeeded", "skipped", "succeeded"]


def test_a_run_waits_while_the_batch_before_it_has_not_ended(database: Database, overlapping: Overlapping) -> None:
    batch_id, second = overlapping(Overlap.WAIT)
    assert ran(database, second) is None
    end_batch(database, batch_id)
    assert [run.run_id for run in looked(database, days=1)] == [second.run_id]
    assert "succeeded" in str(ran(database, second))


def test_runs_are_beside_each_other_where_that_is_allowed(database: Database, overlapping: Overlapping) -> None:
    _, second = overlapping(Overlap.ALLOW)
    assert "succeeded" in str(ran(database, second))


def end_batch(database: Database, batch_id: UUID) -> None:
    execute(database, "UPDATE batches SET state = 'completed', ended_at = now() WHERE id = :id", id=batch_id)


def test_missed_runs_that_wait_begin_one_after_the_other(database: Database) -> None:
    put(database, cron="0 * * * *", ago=3 * 3600 + 600, missed=Missed.ALL, overlap=Overlap.WAIT)
    order = []
    while found := looked(database, seconds=3000):
        (run,) = found
        order.append(run.due_at[11:13])
        ran(database, run)
    assert order == ["23", "00", "01", "02"]


def test_of_a_schedule_whose_runs_pile_up_no_more_wait_than_a_hundred(database: Database) -> None:
    put(database, cron="* * * * *", ago=0, overlap=Overlap.WAIT)
    minutes = schedules.MOST_WAITING // 2
    for place in range(5):
        looked(database, seconds=60 * minutes * place)
        if place == 0:
            execute(database, "UPDATE schedules SET missed = 'all'")
    waiting = rows(database, "SELECT count(*), max(due_at) FROM schedule_runs WHERE state = 'waiting'")
    assert waiting == [(schedules.MOST_WAITING, NOW + timedelta(minutes=schedules.MOST_WAITING))]
    let_go = rows(database, "SELECT due_at, told FROM schedule_runs WHERE state = 'skipped' ORDER BY id DESC")
    assert len(let_go) == 2
    assert let_go[0] == (
        NOW + timedelta(minutes=4 * minutes),
        "missed: 100 runs of it wait already, so none is made from 2026-06-01 04:33 CEST to now",
    )


def test_how_late_a_run_begins_is_counted_from_its_hint_and_once(database: Database) -> None:
    put(database, ago=5 * 86_400)  # due long before anybody looked, which is not its worker's lateness
    (hint,) = looked(database, seconds=3600)
    (view,) = schedules_of(database, "local", now=NOW)
    first = ClaimedRun(hint.run_id, 1, 1, NOW, NOW + timedelta(seconds=3607), view.schedule)
    assert late_s(first, hint) == 7
    assert late_s(replace(first, fence=3), hint) is None  # given back meanwhile


def test_what_was_let_go_is_seen_as_skipped(database: Database) -> None:
    put(database, ago=5 * 86_400, missed=Missed.SKIP)
    assert looked(database, seconds=3600) == []
    assert looked(database, seconds=3600) == []
    (view,) = schedules_of(database, "local", now=NOW)
    (run,) = runs_of(database, view.schedule, limit=10)
    assert run.run.state is RunState.SKIPPED
    assert run.run.told is not None and run.run.told.startswith("missed: nobody looked in time")
    assert f"{run.due_at:%d %H:%M}" == "01 02:00"


def test_a_zone_that_this_machine_does_not_know_holds_no_other_schedule_up(database: Database) -> None:
    put(database, "lost")
    put(database, "fine")
    execute(database, "UPDATE schedules SET timezone = 'Mars/Phobos' WHERE name = 'lost'")
    assert [run.schedule for run in looked(database)] == ["fine"]


def test_old_runs_are_forgotten_but_not_one_whose_batch_goes_on(database: Database, tmp_path: Path) -> None:
    settings = ScheduleSettings(keep_runs=2)
    put(database, overlap=Overlap.ALLOW)
    batch_id = store_batch(database, tmp_path, chats(1))
    for days in range(6):
        (run,) = looked(database, days=days)
        ran(database, run, Ran(0, "", batch_id) if days == 0 else RAN, settings)
    assert rows(database, "SELECT batch_id FROM schedule_runs ORDER BY id") == [(batch_id,), (None,), (None,)]


def test_schedules_are_shown_to_their_tenant_with_what_their_last_run_did(database: Database, tmp_path: Path) -> None:
    put(database)
    put_of(database, "acme", "nightly2")
    (run, _) = looked(database)
    batch_id = store_batch(database, tmp_path, chats(3))
    ran(database, run, Ran(0, "stored", batch_id))
    (view,) = schedules_of(database, "local", now=NOW)
    assert (view.name, f"{view.next_at:%d %H:%M %Z}", view.overdue_since) == ("nightly", "02 02:00 CEST", None)
    assert view.last is not None and view.last.batch is not None
    assert (view.last.batch.id, view.last.batch.total) == (batch_id, 3)
    late = schedules_of(database, "acme", now=NOW + timedelta(days=3))
    assert [f"{one.overdue_since:%d %H:%M}" for one in late] == ["02 02:00"]
    with database.transaction() as session:
        assert not remove_schedule(session, "nightly2", tenant="local")
        assert ask_run(session, "nightly2", tenant="local") is None


def test_a_schedule_in_the_place_of_another_keeps_due_times_unless_they_changed(database: Database) -> None:
    put(database)
    new = NewSchedule("local", "nightly", "0 2 * * *", "Europe/Berlin", ["cost"], "/", Missed.ALL, Overlap.ALLOW)
    with pytest.raises(BadInput, match="--replace"):
        put_schedule(database, new, now=NOW)
    change_schedule(database, new, now=NOW)
    (run,) = looked(database)
    seen: list[list[str]] = []

    def notes(taken: TakenRun, is_ours: IsOurs) -> Ran:
        seen.append(taken.command)
        return RAN

    run_schedule(database, run, execute=notes, settings=SETTINGS)
    assert seen == [["cost"]]
    change_schedule(database, NewSchedule("local", "nightly", "0 1 * * *", *_rest(new)), now=NOW)
    ((due_until,),) = rows(database, "SELECT due_until > now() - interval '1 minute' FROM schedules")
    assert due_until


def _rest(new: NewSchedule) -> tuple[Any, ...]:
    return new.timezone, new.command, new.folder, new.missed, new.overlap


def test_what_a_schedule_may_not_be_is_refused(database: Database) -> None:
    for name in ("", "Nightly", "a b", "-a", "x" * 65, "naïve", "a\n"):
        with pytest.raises(BadInput, match="no name of a schedule"):
            put(database, name)
    with pytest.raises(BadInput, match="--overlap wait or allow"):  # all but one would be skipped
        put(database, missed=Missed.ALL)
    with pytest.raises(BadInput, match="runs as the tenant local"):
        put(database, tenant="acme")


def test_a_schedule_of_another_tenant_does_not_run_as_ours(database: Database) -> None:
    put_of(database, "acme", "nightly")
    (run,) = looked(database)
    assert "failed (exit code 2)" in str(run_schedule(database, run, execute=dies, settings=SETTINGS))
    ((told,),) = rows(database, "SELECT told FROM schedule_runs")
    assert "there can be none of 'acme'" in told


def put_of(database: Database, tenant: str, name: str) -> None:
    """A schedule of another tenant, as no command of ours makes it."""
    put(database, name)
    execute(database, "UPDATE schedules SET tenant = :tenant WHERE name = :name", tenant=tenant, name=name)
