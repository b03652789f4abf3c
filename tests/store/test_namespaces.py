"""Namespaces that nobody uses any more are deleted, in small steps; none is that a user has said something about."""

from __future__ import annotations

from uuid import uuid4

import pytest
from sqlalchemy import text

from store import namespaces
from store.cache_reports import set_ttl
from store.database import Database
from store.namespaces import Round, delete_idle, store_policy
from tests.support.batches import execute

MONTH_S = 2_592_000.0
OTHERS_LOOKUPS = 20_000


def make(database: Database, count: int, *, days_ago: int = 31) -> list[int]:
    """The ids of so many namespaces, made and last used then."""
    with database.transaction() as session:
        return list(
            session.scalars(
                text("""
            INSERT INTO cache_namespaces (tenant, key, endpoint, alias, checkpoint, embedder, template, scope, secret,
                policy, created_at, used_at)
            SELECT 'local', uuid_send(gen_random_uuid()), '', '', '', '', '', '', convert_to('secret-' || g, 'UTF8'),
                '', now() - make_interval(days => :days), now() - make_interval(days => :days)
            FROM generate_series(1, :count) AS g RETURNING id"""),
                {"count": count, "days": days_ago},
            )
        )


def look_up(database: Database, namespace: int, count: int) -> None:
    """So many judged lookups in a namespace, all of one batch."""
    execute(
        database,
        "INSERT INTO cache_lookups (batch_id, seq, namespace_id, version, place, served_beside, coin, rate, wished, "
        "in_shadow, audited, judged_at, folded) SELECT :id, g, :namespace, 1, 0, 0, 0, 0, false, false, false, now(), "
        "true FROM generate_series(1, :count) AS g",
        id=uuid4(),
        namespace=namespace,
        count=count,
    )


def left(database: Database) -> list[int]:
    with database.transaction() as session:
        return list(session.scalars(text("SELECT id FROM cache_namespaces ORDER BY id")))


def deleted(database: Database) -> int:
    with database.transaction() as session:
        return len(delete_idle(session, idle_s=MONTH_S))


def test_to_delete_namespaces_reads_no_lookup_of_another(database: Database) -> None:
    [busy] = make(database, 1, days_ago=0)
    look_up(database, busy, OTHERS_LOOKUPS)
    idle = make(database, 20)
    for namespace in idle:
        look_up(database, namespace, 2)
    with database.transaction() as session:
        session.execute(text("ANALYZE cache_lookups"))
        assert len(delete_idle(session, idle_s=MONTH_S)) == 20
        read = session.scalar(
            text("SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'cache_lookups'")
        )
    assert read == 40
    assert left(database) == [busy]


def test_they_go_some_at_once_and_those_that_somebody_holds_wait(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces, "IDLE_AT_ONCE", 4)
    held = make(database, 6)[0]
    with database.transaction() as session:
        session.execute(text("SELECT FROM cache_namespaces WHERE id = :id FOR UPDATE"), {"id": held})
        assert [deleted(database) for _ in range(3)] == [4, 1, 0]
    assert left(database) == [held]
    assert deleted(database) == 1


def test_one_that_is_still_used_stays_however_old_it_is(database: Database) -> None:
    used, _ = make(database, 2)
    with database.transaction() as session:
        store_policy(session, used, "", made=Round(1, 0, 0, 0), news=[])
    assert deleted(database) == 1
    assert left(database) == [used]


def test_one_with_a_time_to_live_of_its_own_stays(database: Database) -> None:
    limited, _ = make(database, 2)
    with database.transaction() as session:
        set_ttl(session, "local", limited, ttl_s=3600.0)
    assert deleted(database) == 1
    assert left(database) == [limited]
