"""Chapter 2: a worker claims a shard, writes results under its fence, and closes it."""

from __future__ import annotations

from pathlib import Path

from store.database import Database
from store.shards import claim, close, load_jobs, write_results
from tests.support.batches import answers, chats, claimed, dispatch_all, store_batch


def test_a_dispatched_shard_is_claimed_once(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(3))
    [shard_id] = dispatch_all(database)

    with database.transaction() as session:
        first = claim(session, shard_id, holder="first worker", lease_s=30)
    with database.transaction() as session:
        second = claim(session, shard_id, holder="second worker", lease_s=30)

    assert first is not None and first.seqs == (0, 1, 2)
    assert second is None


def test_a_job_is_done_when_it_has_a_result_and_nothing_else_says_so(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(3))
    shard = claimed(database, *dispatch_all(database))

    with database.transaction() as session:
        assert write_results(session, shard, answers([0, 2]), engine_id=None, lease_s=30) == 2
        left = load_jobs(session, shard)

    assert [job.seq for job in left.jobs] == [1]


def test_a_shard_closes_when_all_its_jobs_are_done(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(2))
    shard = claimed(database, *dispatch_all(database))

    with database.transaction() as session:
        write_results(session, shard, answers([0]), engine_id=None, lease_s=30)
        assert not close(session, shard)
        write_results(session, shard, answers([1]), engine_id=None, lease_s=30)
        assert close(session, shard)
