"""`stoker schedule` and `stoker purge` on real rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from models.names import batch_name, short_name
from pipeline.schedules import Ran, look, run_schedule
from runtime.errors import BadInput, NotFound
from runtime.settings import PostgresSettings, RedisSettings, ScheduleSettings, Settings
from scripts.purge_command import purge
from scripts.schedule_commands import schedule
from scripts.stoker import cli
from store.database import Database
from tests.support.batches import chats, execute, rows, store_batch

Invoke = Callable[..., Result]
CRON = ("--cron", "0 2 * * *")


@pytest.fixture
def invoke(postgres_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs a command of `stoker schedule` in a folder with a batch file."""
    (tmp_path / "q.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # a table of 80 would fold what is looked for
    settings = Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url), redis=RedisSettings(url=redis_url), schedule=ScheduleSettings()
    )

    def invoke(*words: str, of: str = "schedule") -> Result:
        of_stoker = click.Context(cli, obj=settings)
        return CliRunner().invoke(schedule if of == "schedule" else purge, list(words), parent=of_stoker)

    return invoke


def test_a_schedule_is_added_listed_run_shown_and_removed(invoke: Invoke, database: Database, tmp_path: Path) -> None:
    added = invoke("add", "nightly", *CRON, "--timezone", "Europe/Berlin", "--", "submit", "q.jsonl", "--set", "a=b c")
    assert added.exit_code == 0, added.output
    assert added.stdout == "nightly\n" and "02:00 CE" in added.stderr and "no control worker is live" in added.stderr
    (listed,) = json.loads(invoke("list", "--json").stdout)
    assert (listed["command"], listed["folder"]) == ("submit q.jsonl --set 'a=b c'", str(tmp_path))
    assert (listed["missed"], listed["overlap"], listed["last"]) == ("once", "skip", None)
    run = int(invoke("run", "nightly").stdout)
    (due,) = look(database, settings=ScheduleSettings())
    assert due.run_id == run
    batch_id = store_batch(database, tmp_path, chats(2))
    done = Ran(0, f"2 jobs stored\n{batch_name(batch_id)}", batch_id)
    run_schedule(database, due, execute=lambda _, __: done, settings=ScheduleSettings())
    shown = invoke("show", "nightly").stdout
    assert "(asked for)" in shown and "in_progress, 0 of 2 jobs done" in shown and short_name(batch_id) in shown
    (figures,) = json.loads(invoke("show", "nightly", "--json").stdout)["runs"]
    assert figures["batch_counts"] == {"state": "in_progress", "jobs": 2, "done": 0, "failed": 0}
    assert "0 of 2 jobs done" in invoke("list").stdout
    assert invoke("remove", "nightly").exit_code == 0
    assert rows(database, "SELECT count(*) FROM schedule_runs") == [(0,)]
    for words in (("show", "nightly"), ("remove", "nightly"), ("run", "nightly")):
        assert isinstance(invoke(*words).exception, NotFound)
    assert "no schedule yet" in invoke("list").stderr


def test_paths_are_meant_in_the_folder_that_is_named(invoke: Invoke, database: Database, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "there.jsonl").write_text("{}\n")
    assert isinstance(invoke("add", "x", *CRON, "--", "submit", "there.jsonl").exception, BadInput)
    assert rows(database, "SELECT count(*) FROM schedules") == [(0,)]
    added = invoke("add", "x", *CRON, "--folder", "below", "--json", "--", "submit", "there.jsonl")
    assert json.loads(added.stdout)["folder"] == str(tmp_path / "below")


def test_all_missed_runs_wait_for_each_other_unless_said_otherwise(invoke: Invoke) -> None:
    assert json.loads(invoke("add", "x", *CRON, "--missed", "all", "--json", "--", "cost").stdout)["overlap"] == "wait"
    replaced = invoke("add", "x", "--cron", "@hourly", "--replace", "--json", "--", "cost")
    assert json.loads(replaced.stdout)["missed"] == "once"


def test_a_purge_takes_ended_batches_of_one_tenant_only(invoke: Invoke, database: Database, tmp_path: Path) -> None:
    for tenant in ("local", "local", "acme"):
        store_batch(database, tmp_path, chats(1), tenant=tenant)
    execute(
        database,
        "UPDATE batches SET state = 'completed', ended_at = now() - interval '40 days' "
        "WHERE id IN (SELECT DISTINCT ON (tenant) id FROM batches ORDER BY tenant, id)",
    )
    assert "0 batches deleted" in invoke("--older-than", "41d", of="purge").stderr
    assert "1 batch would be deleted" in invoke("--older-than", "39d", "--dry-run", of="purge").stderr
    assert "1 batch deleted" in invoke("--older-than", "39d", of="purge").stderr
    assert json.loads(invoke("--older-than", "39d", "--json", of="purge").stdout) == {"batches": 0, "dry_run": False}
    assert rows(database, "SELECT tenant, count(*) FROM batches WHERE deleted_at IS NULL GROUP BY 1 ORDER BY 1") == [
        ("acme", 1),
        ("local", 1),
    ]
