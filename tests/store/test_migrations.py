"""Migrations of a system that works meanwhile: what they may do, how they wait, what code of other revisions does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event

import migrations
from runtime.clock import utc_now
from runtime.errors import LockHeld, ServiceUnreachable
from runtime.settings import PostgresSettings, Settings
from store.database import Database, Session
from store.revisions import await_schema, schema_revisions
from store.schema import make_partitions, migrate
from tests.conftest import empty_database
from tests.support.batches import execute, rows
from tests.support.waiting import wait_until
from worker.celery_app import _await_schema

LOCK_TIMEOUT = "500ms"
FIRST_TRIED = "0006"  # the first that was applied under load: benchmarks/results/upgrade.json
STYLE = (  # not about what runs meanwhile, or seen to by alembic and migrations/env.py
    "prefer-bigint-over-int",
    "prefer-bigint-over-smallint",
    "prefer-identity",
    "prefer-robust-stmts",
    "prefer-text-field",
    "require-statement-timeout",
)
WAIT_S = 20.0


@contextmanager
def database_at(revision: str) -> Iterator[Database]:
    """A database that code of this revision has migrated."""
    with empty_database("template1") as url:
        database = Database(url)
        try:
            with database.transaction() as session:
                config = alembic_config()
                config.attributes["connection"] = session.connection()
                command.upgrade(config, revision)
            yield database
        finally:
            database.close()


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


def statements_of(database: Database) -> dict[str, list[str]]:
    """What each missing revision sends to Postgres to change the schema, as it sends it."""
    found: dict[str, list[str]] = {}
    sent: list[str] = []

    def note(*about: Any) -> None:
        statement = about[2].strip()
        if done := re.search(r"(?:version_num=|VALUES \()'(\w+)'", statement):
            found[done[1]] = sent.copy()
            sent.clear()
        elif not statement.startswith("SELECT"):
            sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        migrate(database)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return found


def faults(statements: list[str]) -> list[str]:
    """What the linter finds in the statements of one transaction that old code could not live with."""
    squawk = str(Path(sys.executable).with_name("squawk"))
    options = [f"--exclude={','.join(STYLE)}", "--assume-in-transaction", "--reporter=json", "--stdin-filepath=sql"]
    given = "".join(f"{statement};\n" for statement in statements)
    done = subprocess.run([squawk, *options], input=given, capture_output=True, text=True, check=False)
    return [f"{found['rule_name']}: {found['message']}" for found in json.loads(done.stdout)]


def revision_of(database: Database) -> str | None:
    with database.transaction() as session:
        return schema_revisions(session).current


def test_old_code_can_live_with_every_revision() -> None:
    with database_at("0005") as database:
        sent = statements_of(database)
    assert min(sent) == FIRST_TRIED and all(sent.values())
    waits = {revision: [one for one in statements if "lock_timeout" in one] for revision, statements in sent.items()}
    assert waits == {revision: [f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"] for revision in sent}, "env.py's alone"
    assert {revision: faults(statements) for revision, statements in sent.items()} == {
        revision: [] for revision in sent
    }


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("ALTER TABLE batches DROP COLUMN spill", "ban-drop-column"),
        ("ALTER TABLE batches RENAME COLUMN spill TO spilled", "renaming-column"),
        ("ALTER TABLE batches ADD COLUMN new INTEGER NOT NULL", "adding-required-field"),
        ("ALTER TABLE batches ADD CONSTRAINT new CHECK (spill > 0)", "constraint-missing-not-valid"),
        ("ALTER TABLE results ALTER COLUMN cost TYPE NUMERIC", "changing-column-type"),
        ("DROP VIEW backlog", "ban-drop-view"),
        ("CREATE INDEX new ON results (cost)", "require-concurrent-index-creation"),
    ],
)
def test_what_old_code_could_not_live_with_is_found_unless_it_is_said_to_be_meant(statement: str, rule: str) -> None:
    waits = "SET LOCAL lock_timeout = '500ms'"
    assert [fault.partition(":")[0] for fault in faults([waits, statement])] == [rule]
    assert faults([waits, f"-- squawk-ignore {rule}\n{statement}"]) == []


def test_the_revisions_that_are_known_without_alembic_are_alembics_own(database: Database) -> None:
    with database.transaction() as session:
        known = schema_revisions(session).known
    scripts = ScriptDirectory.from_config(alembic_config()).walk_revisions()
    assert known == [script.revision for script in scripts][::-1]


def test_a_migration_that_does_not_get_a_table_says_who_has_it_changes_nothing_and_can_be_repeated() -> None:
    with database_at("0005") as database, database.connection() as reader:
        reader.execute("SELECT FROM results LIMIT 1")
        reader.execute("SELECT pg_sleep(1)")  # long enough to be told of
        with pytest.raises(
            LockHeld, match=r"others' work in the way.*open for longest: stoker \d+ on .*, \d+ s"
        ) as held:
            migrate(database, patience_s=0)
        assert "nothing was changed" in str(held.value)
        assert revision_of(database) == "0005"
        with ThreadPoolExecutor(1) as pool:
            migrating = pool.submit(migrate, database)
            waits = "SELECT 1 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted"
            wait_until(lambda: rows(database, waits), WAIT_S, "it waits for the reader")
            wait_until(lambda: not rows(database, waits), WAIT_S, "it lets others pass")
            reader.rollback()
            migrating.result(WAIT_S)
        with database.transaction() as session:
            assert not schema_revisions(session).is_behind


def test_a_new_process_waits_for_the_migration_and_an_old_one_goes_on_after_it() -> None:
    stop = threading.Event()
    with database_at("0005") as database, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(await_schema, database, stop)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        migrate(database)
        waiting.result(WAIT_S)
        execute(database, "UPDATE alembic_version SET version_num = '9999'")
        await_schema(database)
        migrate(database)
        assert revision_of(database) == "9999"


def test_who_waits_for_a_migration_can_be_ended() -> None:
    stop = threading.Event()
    with database_at("0005") as database, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(await_schema, database, stop)
        stop.set()
        waiting.result(WAIT_S)
        with database.transaction() as session:
            assert schema_revisions(session).is_behind


def test_an_empty_database_is_behind() -> None:
    with empty_database("template1") as url:
        database = Database(url)
        with database.transaction() as session:
            revisions = schema_revisions(session)
        database.close()
    assert (revisions.current, revisions.is_behind, revisions.is_ahead) == (None, True, False)


def test_partitions_are_made_when_nobody_is_in_the_way_and_nobody_is_held_up_by_it(database: Database) -> None:
    later = utc_now() + timedelta(weeks=30)
    made = "SELECT count(*) FROM pg_class WHERE relispartition AND relkind = 'r'"
    ((before,),) = rows(database, made)
    with database.connection() as dump:
        dump.execute("LOCK TABLE jobs, results IN ACCESS SHARE MODE")
        began = time.monotonic()
        make_partitions(database, now=later)
        assert time.monotonic() - began < 1.0, "one refusal ends the round, and is far below deadlock_timeout"
        assert rows(database, made) == [(before,)]
        migrate(database)
    make_partitions(database, now=later)
    assert rows(database, made) == [(before + 2 * 5,)]


def test_who_begins_while_postgres_is_away_waits_for_it_and_for_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.revisions.LOOK_S", 0.05)
    away = threading.Event()
    away.set()
    with database_at("0007") as database, ThreadPoolExecutor(1) as pool:

        def asked() -> AbstractContextManager[Session]:
            if away.is_set():
                raise ServiceUnreachable("Postgres does not answer")
            return database.transaction()

        workers = SimpleNamespace(transaction=asked, close=lambda: None)
        monkeypatch.setattr("worker.celery_app.Database", lambda *_, **__: workers)
        settings = Settings.model_construct(postgres=PostgresSettings(url="postgresql://nobody@127.0.0.1:1/none"))
        waiting = pool.submit(_await_schema, settings)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        away.clear()
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        migrate(database)
        waiting.result(WAIT_S)
