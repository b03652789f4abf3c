"""A schedule's command as a control worker runs it: where, with what it says, and when it is ended."""

from __future__ import annotations

import os
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from models.messages import LookAtSchedules, RunSchedule
from models.states import Missed, Overlap
from pipeline.schedules import TakenRun, put_schedule
from runtime.clock import utc_now
from runtime.settings import ScheduleSettings, Settings, WorkerSettings
from store.database import Database
from store.looks import LookBoard
from store.schedules import NewSchedule
from tasks.control import ControlContext, look_at_schedules
from tests.acceptance.chats import prompts, write_chats
from tests.support.batches import execute
from tests.support.own_services import free_port
from tests.support.processes import seen_processes
from worker.control import NO_FOLDER, TIMED_OUT, Commands

ENDS_S = 5.0


def taken(folder: Path, *command: str) -> TakenRun:
    return TakenRun(command=list(command), folder=str(folder))


def commands(*, run_s: float = 60, is_draining: bool = False) -> Commands:
    settings = Settings.model_construct(
        schedule=ScheduleSettings(run_s=run_s), worker=WorkerSettings(grace_s=0.1, node="control")
    )
    return Commands(settings, is_draining=lambda: is_draining)


def test_a_command_runs_in_the_schedules_folder_whatever_modules_that_has(tmp_path: Path) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(3))
    for name in ("scripts", "json", "click"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hidden')")

    ran = commands().run(taken(tmp_path, "submit", "in.jsonl", "--dry-run", "--json"), lambda: True)

    assert ran.exit_code == 0, ran.told
    assert '"lines": 3' in ran.told
    assert (ran.batch_id, ran.given_back) == (None, False)


def test_a_wrong_command_ends_with_its_status_and_what_it_said(tmp_path: Path) -> None:
    ran = commands().run(taken(tmp_path, "submit", "missing.jsonl"), lambda: True)

    assert (ran.exit_code, ran.given_back) == (2, False)
    assert "missing.jsonl" in ran.told


@pytest.mark.parametrize(
    ("is_ours", "run_s", "is_draining", "told"),
    [
        (False, 60.0, False, "another worker has this run"),
        (True, 0.5, False, "STOKER_SCHEDULE__RUN_S, 0.5 s"),
        (True, 60.0, True, "its worker stops"),
    ],
)
def test_a_command_is_ended_early_with_all_of_it(
    tmp_path: Path, is_ours: bool, run_s: float, is_draining: bool, told: str
) -> None:
    endless = tmp_path / "nobody-writes.jsonl"
    os.mkfifo(endless)
    began = time.monotonic()

    ran = commands(run_s=run_s, is_draining=is_draining).run(
        taken(tmp_path, "submit", str(endless), "--dry-run"), lambda: is_ours
    )

    assert time.monotonic() - began < ENDS_S
    assert told in ran.told
    assert (ran.exit_code, ran.given_back) == (TIMED_OUT, is_draining)
    assert not [process for process in seen_processes() if str(endless) in process.command]


def test_a_folder_that_is_on_another_machine_is_told_of(tmp_path: Path) -> None:
    ran = commands().run(taken(tmp_path / "elsewhere", "cost"), lambda: True)

    assert ran.exit_code == NO_FOLDER
    assert "elsewhere" in ran.told


def test_hints_of_runs_are_sent_though_redis_is_away(database: Database) -> None:
    new = NewSchedule("local", "nightly", "* * * * *", "UTC", ["cost"], "/", Missed.ONCE, Overlap.SKIP)
    put_schedule(database, new, now=utc_now())
    execute(database, "UPDATE schedules SET due_until = now() - :ago", ago=timedelta(minutes=2))
    sent: list[RunSchedule] = []
    with closing(LookBoard(f"redis://127.0.0.1:{free_port()}/0")) as away:
        context = ControlContext(
            database=database,
            settings=ScheduleSettings(),
            publish=sent.extend,
            execute=commands().run,
            note_look=away.note,
        )
        look_at_schedules(context, LookAtSchedules())
    assert {hint.schedule for hint in sent} == {"nightly"}
