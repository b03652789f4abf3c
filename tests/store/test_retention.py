"""Batches past their retention are deleted in small steps and by week; nothing else is touched."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text

from runtime.clock import utc_now, uuid7_floor, week_start
from store import retention
from store.database import Database
from store.retention import delete_past_retention, delete_some, drop_partition
from store.schema import make_partitions, partition_name
from tests.support.batches import batch_row, chats, execute, store_batch

DAY_S = 86_400.0
TABLES = ("batches", "shards", "job_tries", "jobs", "results", "followers", "cache_lookups")
RETENTION_S = 30 * DAY_S
OLD = utc_now() - timedelta(weeks=10)
OLD_PARTITIONS = {partition_name(table, week_start(OLD)) for table in ("jobs", "results")}


def count(database: Database, table: str, batch_id: UUID) -> int:
    key = "id" if table == "batches" else "batch_id"
    with database.transaction() as session:
        statement = text(f"SELECT count(*) FROM {table} WHERE {key} = :id")
        return int(session.execute(statement, {"id": batch_id}).scalar_one())


def left_of(database: Database, batch_id: UUID) -> dict[str, int]:
    return {table: count(database, table, batch_id) for table in TABLES}


def partitions(database: Database) -> set[str]:
    with database.transaction() as session:
        return set(session.scalars(text("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'")))


def end(database: Database, batch_id: UUID, *, days_ago: float) -> None:
    """End it by hand, with a result for every job and a try."""
    execute(
        database,
        "INSERT INTO results (batch_id, seq, outcome, source, prompt_tokens, completion_tokens, cached_tokens, "
        "reasoning_tokens, duration_ms) SELECT batch_id, seq, 'succeeded', 'engine', 1, 1, 0, 0, 1 FROM jobs "
        "WHERE batch_id = :id",
        id=batch_id,
    )
    execute(
        database,
        "INSERT INTO job_tries (batch_id, seq, tries, not_before, last_error) VALUES (:id, 0, 1, now(), 'busy')",
        id=batch_id,
    )
    execute(database, "INSERT INTO followers (batch_id, seq, leader) VALUES (:id, 1, 0)", id=batch_id)
    execute(
        database,
        "WITH n AS (INSERT INTO cache_namespaces (tenant, key, endpoint, alias, checkpoint, embedder, template, "
        "scope, secret, policy) VALUES ('local', uuid_send(:id), '', '', '', '', '', '', '', '') RETURNING id) "
        "INSERT INTO cache_lookups (batch_id, seq, namespace_id, version, place, served_beside, coin, rate, wished, "
        "in_shadow, audited) SELECT :id, 0, id, 1, 0, 0, 0.5, 0.2, true, true, false FROM n",
        id=batch_id,
    )
    execute(
        database,
        "UPDATE batches SET state = 'completed', ended_at = now() - make_interval(days => :days) WHERE id = :id",
        id=batch_id,
        days=int(days_ago),
    )


def grow_old(database: Database, batch_id: UUID, *, number: int) -> UUID:
    """Give a batch the id that it had if it had been submitted at OLD, in that week's partitions."""
    old = UUID(int=uuid7_floor(OLD).int | (0x7 << 76) | number)
    make_partitions(database, now=OLD)
    execute(
        database,
        "INSERT INTO batches (id, state, endpoint, input_name, input_digest, submit_digest, options) "
        "SELECT :old, state, endpoint, input_name, input_digest, submit_digest, options FROM batches WHERE id = :id",
        old=old,
        id=batch_id,
    )
    execute(database, "UPDATE shards SET batch_id = :old WHERE batch_id = :id", old=old, id=batch_id)
    execute(database, "UPDATE jobs SET batch_id = :old WHERE batch_id = :id", old=old, id=batch_id)
    execute(database, "DELETE FROM batches WHERE id = :id", id=batch_id)
    return old


def let_readers_end(database: Database) -> None:
    """As if the time between out of sight and gone were over."""
    execute(database, "UPDATE batches SET deleted_at = deleted_at - interval '1 day' WHERE deleted_at IS NOT NULL")


def retire(database: Database) -> bool:
    return delete_past_retention(database, retention_s=RETENTION_S)


@pytest.fixture
def recent(database: Database, tmp_path: Path) -> UUID:
    """A batch in this week's partitions."""
    return store_batch(database, tmp_path, chats(10), shard_jobs=2)


@pytest.fixture
def old_pair(database: Database, tmp_path: Path) -> tuple[UUID, UUID]:
    """Two batches that were submitted in one week, long ago."""
    first, second = (store_batch(database, tmp_path, chats(10), shard_jobs=2) for _ in range(2))
    return grow_old(database, first, number=1), grow_old(database, second, number=2)


NOTHING = dict.fromkeys(TABLES, 0)
ALL = {"batches": 1, "shards": 5, "job_tries": 1, "jobs": 10, "results": 10, "followers": 1, "cache_lookups": 1}


def test_a_batch_past_retention_is_out_of_sight_before_any_row_of_it_goes(database: Database, recent: UUID) -> None:
    end(database, recent, days_ago=31)
    assert not retire(database)
    assert batch_row(database, recent)["deleted_at"] is not None
    assert left_of(database, recent) == ALL, "an export that had begun still reads"
    let_readers_end(database)
    before = partitions(database)
    assert not retire(database)
    assert left_of(database, recent) == NOTHING
    assert partitions(database) == before, "this week's stay"


def test_an_audit_that_its_policy_has_not_heard_of_keeps_the_batchs_row_and_nobody_waits_for_it(
    database: Database, tmp_path: Path
) -> None:
    held, after = (store_batch(database, tmp_path, chats(10), shard_jobs=2) for _ in range(2))
    for batch_id in (held, after):
        end(database, batch_id, days_ago=31)
    execute(database, "UPDATE cache_lookups SET audited = true WHERE batch_id = :id", id=held)
    retire(database)
    let_readers_end(database)
    assert not retire(database)
    assert left_of(database, held) == {**NOTHING, "batches": 1, "cache_lookups": 1}
    assert left_of(database, after) == NOTHING
    execute(database, "UPDATE cache_lookups SET folded = true WHERE batch_id = :id", id=held)
    assert not retire(database)
    assert left_of(database, held) == NOTHING


def test_a_batch_within_retention_and_a_running_one_are_not_touched(
    database: Database, recent: UUID, old_pair: tuple[UUID, UUID]
) -> None:
    end(database, recent, days_ago=29)
    running, cancelling = old_pair
    execute(database, "UPDATE batches SET state = 'cancelling', ending = 'cancelled' WHERE id = :id", id=cancelling)
    for _ in range(2):
        assert not retire(database)
        let_readers_end(database)
    assert left_of(database, recent) == ALL
    for batch_id in (running, cancelling):
        assert left_of(database, batch_id) == {**ALL, "job_tries": 0, "results": 0, "followers": 0, "cache_lookups": 0}
        assert batch_row(database, batch_id)["deleted_at"] is None
    assert partitions(database) >= OLD_PARTITIONS


def test_a_week_of_deleted_batches_goes_as_a_whole(database: Database, old_pair: tuple[UUID, UUID]) -> None:
    for batch_id in old_pair:
        end(database, batch_id, days_ago=40)
    retire(database)
    assert partitions(database) >= OLD_PARTITIONS
    let_readers_end(database)
    assert not retire(database)
    assert not partitions(database) & OLD_PARTITIONS
    assert [left_of(database, batch_id) for batch_id in old_pair] == [NOTHING, NOTHING]


def test_a_batch_within_retention_keeps_its_weeks_partitions(database: Database, old_pair: tuple[UUID, UUID]) -> None:
    past, within = old_pair
    end(database, past, days_ago=40)
    end(database, within, days_ago=20)  # it ran for weeks
    retire(database)
    let_readers_end(database)
    assert not retire(database)
    assert left_of(database, past) == NOTHING
    assert left_of(database, within) == ALL
    assert partitions(database) >= OLD_PARTITIONS


def test_rows_in_the_default_partition_go_by_small_deletes(database: Database, old_pair: tuple[UUID, UUID]) -> None:
    for name in OLD_PARTITIONS:
        table = name.partition("_")[0]
        execute(database, f"ALTER TABLE {table} DETACH PARTITION {name}")
        execute(database, f"INSERT INTO {table} SELECT * FROM {name}")
        execute(database, f"DROP TABLE {name}")
    for batch_id in old_pair:
        end(database, batch_id, days_ago=40)
    assert count(database, "jobs_default", old_pair[0]) == 10
    retire(database)
    let_readers_end(database)
    before = partitions(database)
    assert not retire(database)
    assert partitions(database) == before
    assert [left_of(database, batch_id) for batch_id in old_pair] == [NOTHING, NOTHING]


def test_deleting_that_was_cut_off_goes_on(database: Database, recent: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 4)
    end(database, recent, days_ago=31)
    retire(database)
    let_readers_end(database)
    seen = []
    more = True
    while more:
        seen.append(sum(left_of(database, recent).values()))
        with pytest.raises(ZeroDivisionError), database.transaction() as session:
            delete_some(session)
            raise ZeroDivisionError  # a leader that dies before its commit
        assert sum(left_of(database, recent).values()) == seen[-1]
        with database.transaction() as session:
            more = delete_some(session)
    assert seen[0] == sum(ALL.values())
    assert all(0 < before - after <= 5 for before, after in pairwise(seen)), "in small steps"
    assert left_of(database, recent) == NOTHING


def test_a_step_is_bounded_and_says_that_there_is_more(
    database: Database, recent: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(database, recent, days_ago=31)
    retire(database)
    let_readers_end(database)
    monkeypatch.setattr(retention, "SLICE_S", 0.0)
    assert retire(database)
    assert left_of(database, recent) == ALL
    monkeypatch.undo()
    assert not retire(database)
    assert left_of(database, recent) == NOTHING


def test_two_leaders_do_not_wait_for_each_other(database: Database, recent: UUID) -> None:
    end(database, recent, days_ago=31)
    retire(database)
    let_readers_end(database)
    with database.transaction() as frozen:
        assert delete_some(frozen)
        assert not retire(database), "the other has it"
    assert not retire(database)
    assert left_of(database, recent) == NOTHING


def test_a_partition_that_is_read_is_dropped_later_and_nobody_waits(
    database: Database, old_pair: tuple[UUID, UUID]
) -> None:
    for batch_id in old_pair:
        end(database, batch_id, days_ago=40)
    retire(database)
    let_readers_end(database)
    with database.transaction() as reader:
        assert reader.execute(text("SELECT count(*) FROM results")).scalar_one() == 20
        retire(database)
        assert partitions(database) >= OLD_PARTITIONS - {partition_name("jobs", week_start(OLD))}
        assert reader.execute(text("SELECT count(*) FROM results WHERE seq < 0")).scalar_one() == 0
    assert not retire(database)
    assert not partitions(database) & OLD_PARTITIONS


def test_a_batch_that_came_into_the_week_at_the_last_moment_keeps_the_partition(
    database: Database, old_pair: tuple[UUID, UUID]
) -> None:
    end(database, old_pair[0], days_ago=40)
    for name in OLD_PARTITIONS:
        with database.transaction() as session:
            assert not drop_partition(session, name), "chosen before the second batch was stored"
    assert partitions(database) >= OLD_PARTITIONS
