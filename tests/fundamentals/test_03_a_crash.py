"""Chapter 3: a worker dies. Its lease runs out, another takes the shard, and the dead can change nothing."""

from __future__ import annotations

from pathlib import Path

from store.database import Database
from store.shards import load_jobs, recover_dead_leases, write_results
from tests.support.batches import answers, chats, claimed, dispatch_all, store_batch
from tests.support.waiting import wait_until

LEASE_S = 0.2


def test_the_next_worker_runs_only_what_the_dead_one_had_not_written(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(3))
    dead = claimed(database, *dispatch_all(database), lease_s=LEASE_S)
    with database.transaction() as session:
        write_results(session, dead, answers([0]), engine_id=None, lease_s=LEASE_S)

    _wait_recovered(database)
    following = claimed(database, *dispatch_all(database))

    assert following.shard_id == dead.shard_id and following.fence > dead.fence
    with database.transaction() as session:
        assert [job.seq for job in load_jobs(session, following).jobs] == [1, 2]


def test_a_worker_that_wakes_too_late_writes_nothing(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(1))
    sleeper = claimed(database, *dispatch_all(database), lease_s=LEASE_S)
    _wait_recovered(database)
    following = claimed(database, *dispatch_all(database))

    with database.transaction() as session:
        assert write_results(session, sleeper, answers([0]), engine_id=None, lease_s=30) is None
        assert write_results(session, following, answers([0]), engine_id=None, lease_s=30) == 1


def _wait_recovered(database: Database) -> None:
    def is_recovered() -> bool:
        with database.transaction() as session:
            return bool(recover_dead_leases(session, lease_s=LEASE_S))

    wait_until(is_recovered, 10, "the lease is over")
