"""Schedules on real Postgres: one run a due time, one process a run, one batch a submit, whoever dies."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from models.lines import SubmitOptions
from models.states import Missed, Overlap, RunState
from pipeline import schedules
from pipeline.schedules import DueRun, IsOurs, Ran, TakenRun, look, put_schedule, run_schedule, runs_of, schedules_of
from pipeline.submit import submit_file
from runtime.errors import BadInput
from runtime.settings import ScheduleSettings, Settings
from store.database import Database
from store.schedules import NewSchedule, ask_run, remove_schedule
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
    put_schedule(database, NewSchedule(**(fields | changed)), now=NOW, replace=False)
    execute(
        database,
        "UPDATE schedules SET due_until = :until WHERE name = :name",
        until=NOW - timedelta(seconds=ago),
        name=name,
    )


def looked(database: Database, *, days: int = 0, seconds: float = 0) -> list[DueRun]:
    return look(database, settings=SETTINGS, now=NOW + timedelta(days=days, seconds=seconds))


def ran(database: Database, run: DueRun, became: Ran = RAN, settings: ScheduleSettings = SETTINGS) -> str | None:
    return run_schedule(database, run.run_id, execute=lambda _, __: became, settings=settings)


def states(database: Database) -> list[str]:
    return [state for (state,) in rows(database, "SELECT state FROM schedule_runs ORDER BY id")]


def die(database: Database) -> None:
    """End the leases of the runs that nobody keeps."""
    execute(database, "UPDATE schedule_runs SET lease_until = now() - interval '1 s' WHERE state = 'running'")


class Died(BaseException):
    """Stands for a process that ended in the middle."""


def dies(taken: TakenRun, is_ours: IsOurs) -> Ran:
    raise Died


def begun(database: Database, run: DueRun) -> None:
    """Claimed by a process that then died."""
    with pytest.raises(Died):
        run_schedule(database, run.run_id, execute=dies, settings=SETTINGS)


def test_a_due_time_is_run_once_with_its_command_in_its_folder_and_zone(database: Database) -> None:
    put(database, "nightly", "submit", "q-{due:%Y-%m-%d}.jsonl", "--set", "x={due}", folder="/srv")
    (run,) = looked(database)
    assert (run.schedule, f"{run.due_at:%Y-%m-%d %H:%M %Z}") == ("nightly", "2026-06-01 02:00 CEST")
    assert looked(database) == []
    seen: list[TakenRun] = []

    def execute_it(taken: TakenRun, is_ours: IsOurs) -> Ran:
        assert is_ours()
        assert run_schedule(database, taken.run_id, execute=dies, settings=SETTINGS) is None  # it is ours alone
        seen.append(taken)
        return Ran(0, "stored")

    said = run_schedule(database, run.run_id, execute=execute_it, settings=SETTINGS)
    assert said is not None and said.startswith("nightly due 2026-06-01 02:00 CEST: succeeded, after 0.")
    (taken,) = seen
    key = f"schedule-run-{run.run_id}"
    assert taken.command == ["submit", "--idempotency-key", key, "q-2026-06-01.jsonl", "--set", "x={due}"]
    assert (taken.folder, taken.tenant, taken.fence) == ("/srv", "local", 1)
    assert ran(database, run) is None
    assert [after.due_at - run.due_at for after in looked(database, days=1)] == [timedelta(days=1)]


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
    first = looked(database)
    assert looked(database, seconds=59) == []
    assert looked(database, seconds=61) == first


def test_a_run_whose_worker_died_is_run_again_three_times_at_most(database: Database) -> None:
    put(database)
    for _ in range(schedules.MOST_TRIES):
        (run,) = looked(database, seconds=100)
        begun(database, run)
        assert looked(database, seconds=0) == []  # its lease holds
        die(database)
    assert looked(database, seconds=100) == []
    assert rows(database, "SELECT state, told FROM schedule_runs") == [
        ("failed", "its worker died 3 times; see the log of the control workers")
    ]


def test_what_a_worker_writes_after_another_took_over_is_not_written(database: Database) -> None:
    put(database)
    (run,) = looked(database)

    def too_late(taken: TakenRun, is_ours: IsOurs) -> Ran:
        die(database)
        (again,) = looked(database, seconds=100)
        assert ran(database, again, Ran(0, "the second")) is not None
        return Ran(1, "the first")

    said = run_schedule(database, run.run_id, execute=too_late, settings=SETTINGS)
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
    said = run_schedule(database, run.run_id, execute=until_lost, settings=settings)
    assert said is not None and "lost" in said
    assert states(database) == []


def test_a_run_given_back_or_without_services_waits_again(database: Database) -> None:
    put(database)
    (run,) = looked(database)
    assert "given back" in str(ran(database, run, Ran(-15, "drained", given_back=True)))
    assert looked(database) == [run]  # at once, and it counts as no try
    for _ in range(schedules.MOST_TRIES - 1):
        assert "given back" in str(ran(database, run, Ran(schedules.EXIT_UNREACHABLE, "no Postgres")))
        assert looked(database) == []  # a while later
    assert "failed (exit code 3)" in str(ran(database, run, Ran(schedules.EXIT_UNREACHABLE, "no Postgres")))
    assert rows(database, "SELECT tries, exit_code, told FROM schedule_runs") == [(3, 3, "no Postgres")]


@pytest.mark.parametrize("end", ["dies", "is killed"])
def test_a_submit_that_is_cut_off_after_it_stored_makes_no_second_batch(
    database: Database, tmp_path: Path, end: str
) -> None:
    put(database, "nightly", "submit", "x.jsonl")
    (run,) = looked(database)
    stored: list[UUID] = []

    def stores(taken: TakenRun, is_ours: IsOurs) -> Ran:
        stored.append(submitted(database, tmp_path, key=taken.command[2]))
        if end == "dies":
            raise Died
        return Ran(-9, "killed before it could say what it stored")

    if end == "dies":
        with pytest.raises(Died):
            run_schedule(database, run.run_id, execute=stores, settings=SETTINGS)
        die(database)
        (tmp_path / "x.jsonl").write_text("changed meanwhile")
        (again,) = looked(database, seconds=3 * 3600)  # nobody was there for hours
        assert run_schedule(database, again.run_id, execute=dies, settings=SETTINGS) is not None
    else:
        run_schedule(database, run.run_id, execute=stores, settings=SETTINGS)
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
        run_schedule(database, run.run_id, execute=stores, settings=SETTINGS)
    assert rows(database, "SELECT count(*) FROM batches") == [(2,)]


Overlapping = Callable[[Overlap], tuple[UUID, DueRun]]


@pytest.fixture
def overlapping(database: Database, tmp_path: Path) -> Overlapping:
    """A run whose batch has not ended, and the one that is due after it."""

    def made(overlap: Overlap) -> tuple[UUID, DueRun]:
        put(database, overlap=overlap)
        (first,) = looked(database)
        batch_id = store_batch(database, tmp_path, chats(1))
        ran(database, first, Ran(0, "stored", batch_id))
        found = looked(database, days=1)
        assert len(found) == (0 if overlap is Overlap.WAIT else 1)
        (second,) = rows(database, "SELECT max(id) FROM schedule_runs")
        return batch_id, DueRun(second[0], "nightly", NOW)

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
        order.append(run.due_at.hour)
        ran(database, run)
    assert order == [23, 0, 1, 2]


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
    put(database, "nightly2", tenant="acme")
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
        put_schedule(database, new, now=NOW, replace=False)
    put_schedule(database, new, now=NOW, replace=True)
    (run,) = looked(database)
    seen: list[list[str]] = []

    def notes(taken: TakenRun, is_ours: IsOurs) -> Ran:
        seen.append(taken.command)
        return RAN

    run_schedule(database, run.run_id, execute=notes, settings=SETTINGS)
    assert seen == [["cost"]]
    put_schedule(database, NewSchedule("local", "nightly", "0 1 * * *", *_rest(new)), now=NOW, replace=True)
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
