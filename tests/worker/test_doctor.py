"""What `stoker doctor` says of schedules."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models.states import Missed, Overlap
from pipeline.schedules import put_schedule
from runtime.clock import utc_now
from runtime.settings import BrokerSettings, EngineSettings, PostgresSettings, RedisSettings, Settings
from store.database import Database
from store.looks import LookBoard
from store.presence import PresenceBoard, WorkerPresence
from store.schedules import NewSchedule
from tests.support.batches import execute
from worker.doctor import Finding, examine

LEAVING = "from documents.confinement import leave_network; print(leave_network())"
NO_NAMESPACE = "no namespace is allowed here: Python's calls to the network are refused, native code's are not"


@pytest.fixture
def settings(postgres_url: str, broker_url: str, redis_url: str) -> Settings:
    return Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url),
        broker=BrokerSettings(url=broker_url),
        redis=RedisSettings(url=redis_url),
        engine=EngineSettings(kind="none"),
    )


def of_schedules(settings: Settings) -> Finding:
    (found,) = [finding for finding in examine(settings) if finding.what == "schedules"]
    return found


def test_doctor_says_which_schedules_are_overdue_and_whether_anybody_runs_them(
    settings: Settings, database: Database
) -> None:
    assert (of_schedules(settings).found, of_schedules(settings).remedy) == ("none", "")

    new = NewSchedule("local", "nightly", "0 2 * * *", "Europe/Berlin", ["cost"], "/", Missed.ONCE, Overlap.SKIP)
    put_schedule(database, new, now=utc_now())
    nobody = of_schedules(settings)
    assert nobody.found == "1, 0 overdue, 0 failed last; run by 0 control workers; last looked for at no known time"
    assert "stoker worker --node control" in nobody.remedy

    board, looks = PresenceBoard(settings.require_redis()), LookBoard(settings.require_redis())
    runner = WorkerPresence(name="one", node="control", children=4, models=[], engine="runs schedules", healthy=True)
    board.announce(runner)
    looks.note()
    assert of_schedules(settings).is_well
    execute(
        database, "INSERT INTO schedule_runs (schedule_id, due_at, state) SELECT id, now(), 'failed' FROM schedules"
    )
    assert of_schedules(settings).remedy == "`stoker schedule show nightly` says why"

    execute(database, "UPDATE schedules SET due_until = now() - interval '2 d'")
    late = of_schedules(settings)
    assert late.found.startswith("1, 1 overdue (nightly), 1 failed last (nightly); run by 1 control workers; last ")
    assert "STOKER_WORKER__CHILDREN" in late.remedy
    looks.close()
    board.close()


def test_doctor_says_whether_a_documents_reader_has_a_network(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str:
        (readers,) = [finding for finding in examine(settings) if finding.what == "documents' readers"]
        assert readers.is_well
        return readers.found

    monkeypatch.setattr("worker.doctor.sys.executable", "/bin/false")
    assert found() == NO_NAMESPACE
    monkeypatch.undo()
    tried = subprocess.run([sys.executable, "-c", LEAVING], check=True, capture_output=True, text=True).stdout
    assert found() == {"True\n": "have no network", "False\n": NO_NAMESPACE}[tried]


def test_doctor_says_which_way_the_schema_and_this_version_differ(settings: Settings, database: Database) -> None:
    def remedy() -> str:
        (found,) = [finding for finding in examine(settings) if finding.what == "schema"]
        return found.remedy

    assert remedy() == ""
    execute(database, "UPDATE alembic_version SET version_num = '0007'")
    assert "run `stoker migrate`" in remedy()
    execute(database, "UPDATE alembic_version SET version_num = '9999'")
    assert "update it soon" in remedy() and "migrate" not in remedy()
