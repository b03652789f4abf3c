"""A migrated database for each test, cloned from a template; for as long as tests/conftest.py has none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from store.database import Database
from store.schema import migrate

SERVER = os.environ.get("STOKER_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1")


@pytest.fixture(scope="session")
def template() -> Iterator[str]:
    name = f"stoker_submit_{uuid4().hex[:8]}"
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        database = Database(f"{SERVER}/{name}")
        migrate(database)
        database.close()
        yield name
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database(template: str) -> Iterator[Database]:
    name = f"{template}_{uuid4().hex[:8]}"
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
        database = Database(f"{SERVER}/{name}")
        yield database
        database.close()
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
