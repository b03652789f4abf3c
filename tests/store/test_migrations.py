"""Migrations of a system that works meanwhile: what they may do, how they wait, and what code of another revision does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text

from runtime.errors import LockHeld
from store.database import Database
from store.revisions import LOOK_S, Revisions, await_schema, schema_revisions
from store.schema import migrate
from tests.conftest import empty_database
from tests.support.batches import execute, rows
from tests.support.waiting import wait_until

# Of revisions before the first that was tried under load (benchmarks/results/upgrade.json).
FIRST_HELD = "0006"
# Of style, and of what alembic and migrations/env.py see to.
RULES = (
    "prefer-bigint-over-int",
    "prefer-bigint-over-smallint",
    "prefer-identity",
    "prefer-robust-stmts",
    "prefer-text-field",
    "require-statement-timeout",
    "require-table-schema",
)


def findings(statements: list[str]) -> list[str]:
    """What the linter says of statements of one transaction: rule and line."""
    command = [str(Path(sys.executable).with_name("squawk")), "--assume-in-transaction", "--reporter", "json"]
    given = ";\n".join(statements) + ";"
    done = subprocess.run(
        [*command, *(f"--exclude={rule}" for rule in RULES), "--stdin-filepath", "revision.sql"],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return [f"{found['rule_name']}: {found['message']}" for found in json.loads(done.stdout)]


def statements_by_revision(url: str) -> dict[str, list[str]]:
    """What each revision sends to Postgres, parameters included."""
    found: dict[str, list[str]] = {}
    sent: list[str] = []

    def note(_: Connection, __: Any, statement: str, *rest: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    database = Database(url)
    try:
        migrate(database)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
        database.close()
    return found | {"all": sent}


def test_x(postgres_template: str) -> None:
    with empty_database("template1") as url:
        for s in statements_by_revision(url)["all"]:
            print("@@", s)
    assert 0
