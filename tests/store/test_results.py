"""What status reads of jobs in trouble: those that ended as poison, those that wait for another try."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from models.jobs import failed
from runtime.clock import utc_now
from store.batches import batch_progress, find_batches, latest_batches
from store.database import Database
from store.results import dead_jobs, waiting_jobs
from store.shards import Retry, write_results, write_retries
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, execute, store_batch


def test_dead_jobs_are_listed_newest_first_of_one_batch_or_of_all(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(10), shard_jobs=4)
    second = store_batch(database, tmp_path, chats(3))
    other = store_batch(database, tmp_path, chats(3), tenant="other")
    for shard_id in dispatch_all(database):
        taken = claimed(database, shard_id)
        poison = failed(taken.seqs[1], code="poison_job", message=f"killed {taken.batch_id}")
        late = failed(taken.seqs[0], code="timeout", message="late")
        with database.transaction() as session:
            write_results(session, taken, [poison, late], engine_id=None, lease_s=LEASE_S)
    with database.transaction() as session:
        dead = dead_jobs(session, tenant="local", batch_id=None, limit=20)
        assert [(job.batch_id, job.seq, job.custom_id) for job in dead] == [
            (second, 1, "id-1"),
            (first, 9, "id-9"),
            (first, 5, "id-5"),
            (first, 1, "id-1"),
        ]
        assert dead[0].message == f"killed {second}"
        assert dead_jobs(session, tenant="local", batch_id=first, limit=2) == dead[1:3]
        assert dead_jobs(session, tenant="local", batch_id=other, limit=2) == []


def test_jobs_that_wait_are_counted_with_their_tries_and_the_last_error(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(5))
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    now = utc_now()
    retries = [
        Retry(seq=0, tries=1, engine_deaths=0, not_before=now + timedelta(seconds=5), error="HTTP 503: busy"),
        Retry(seq=1, tries=3, engine_deaths=0, not_before=now + timedelta(seconds=60), error="HTTP 429: slow down"),
        Retry(seq=2, tries=7, engine_deaths=0, not_before=now + timedelta(seconds=90), error="answered since"),
    ]
    with database.transaction() as session:
        assert waiting_jobs(session, batch_id) is None
        assert write_retries(session, taken, retries)
        write_results(session, taken, answers([2]), engine_id=None, lease_s=LEASE_S)
        waiting = waiting_jobs(session, batch_id)
    assert waiting is not None
    assert (waiting.jobs, waiting.tries, waiting.last_error) == (2, 3, "HTTP 429: slow down")
    assert waiting.next_at == retries[0].not_before
    assert 0 < waiting.next_in_s <= 5


def test_a_deleted_or_validating_batch_is_invisible(database: Database, tmp_path: Path) -> None:
    kept, gone, unborn = [store_batch(database, tmp_path, chats(1)) for _ in range(3)]
    execute(database, "UPDATE batches SET deleted_at = clock_timestamp() WHERE id = :id", id=gone)
    execute(database, "UPDATE batches SET state = 'validating' WHERE id = :id", id=unborn)
    with database.transaction() as session:
        assert [progress.id for progress in latest_batches(session, tenant="local", limit=9)] == [kept]
        assert find_batches(session, gone.hex, tenant="local") == []
        assert find_batches(session, unborn.hex, tenant="local") == []
        assert batch_progress(session, kept, tenant="local").id == kept
