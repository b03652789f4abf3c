"""Stoker needs no superuser: an ordinary role that owns its database migrates it, runs batches in it, keeps house."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from runtime.clock import utc_now
from store.database import Database, libpq_url
from store.retention import drop_partition, droppable_partitions
from store.schema import make_partitions, migrate
from store.shards import write_results
from tests.conftest import POSTGRES
from tests.support.batches import LEASE_S, answers, chat, claimed, dispatch_all, rows, store_batch


@pytest.fixture
def ordinary() -> Iterator[Database]:
    """An empty database of a role that may do nothing but log in."""
    name = sql.Identifier(role := f"stoker_test_{uuid4().hex[:8]}")
    with psycopg.connect(libpq_url(make_url(POSTGRES).set(database="postgres")), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'of-a-test'").format(name))
        try:
            admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, name))
            url = make_url(POSTGRES).set(database=role, username=role, password="of-a-test")
            database = Database(libpq_url(url))
            yield database
            database.close()
        finally:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
            admin.execute(sql.SQL("DROP ROLE {}").format(name))


def test_an_ordinary_role_is_enough(ordinary: Database, tmp_path: Path) -> None:
    assert rows(ordinary, "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user") == [(False,)]
    migrate(ordinary)
    store_batch(ordinary, tmp_path, [chat(f"question {number}") for number in range(3)], shard_jobs=3)
    [shard] = dispatch_all(ordinary)
    taken = claimed(ordinary, shard)
    with ordinary.transaction() as session:
        assert write_results(session, taken, answers(taken.seqs), engine_id=None, lease_s=LEASE_S) == 3
    later = utc_now() + timedelta(weeks=30)
    make_partitions(ordinary, now=later)
    with ordinary.transaction() as session:
        past = droppable_partitions(session, now=later)
        assert past and all([drop_partition(session, one) for one in past])
