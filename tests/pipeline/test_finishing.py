"""How the leader ends batches: small ones at once, a large one in parts."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from pipeline.finishing import Finisher
from store.database import Database
from store.shards import close, write_results
from tests.support.batches import answers, batch_row, chats, claimed, dispatch_all, execute, store_batch


def finished(database: Database, folder: Path, *, jobs: int) -> UUID:
    """A batch whose last shard is closed."""
    batch_id = store_batch(database, folder, chats(jobs), shard_jobs=4)
    for shard_id in dispatch_all(database):
        shard = claimed(database, shard_id)
        with database.transaction() as session:
            write_results(session, shard, answers(shard.seqs), engine_id=None, lease_s=30)
            close(session, shard)
    return batch_id


def test_the_results_of_a_large_batch_are_counted_over_several_ticks_and_no_small_one_waits_for_it(
    database: Database, tmp_path: Path
) -> None:
    large = finished(database, tmp_path, jobs=10)
    small = finished(database, tmp_path, jobs=3)
    finisher = Finisher(database, counted_at_once=4, count_s=0.0)

    assert finisher.finish_some(), "4 of its 10 results are counted"
    assert (batch_row(database, large)["state"], batch_row(database, small)["state"]) == ("finalizing", "completed")
    assert finisher.finish_some()
    assert not finisher.finish_some()
    assert batch_row(database, large)["state"] == "completed"


def test_a_batch_that_lacks_results_goes_on_and_is_counted_anew_when_it_ends_again(
    database: Database, tmp_path: Path
) -> None:
    batch_id = finished(database, tmp_path, jobs=10)
    execute(database, "DELETE FROM results WHERE batch_id = :id AND seq IN (2, 9)", id=batch_id)
    finisher = Finisher(database, counted_at_once=4, count_s=60.0)

    assert not finisher.finish_some()
    assert (batch_row(database, batch_id)["state"], batch_row(database, batch_id)["shards_left"]) == ("in_progress", 1)
    (shard_id,) = dispatch_all(database)
    shard = claimed(database, shard_id)
    with database.transaction() as session:
        write_results(session, shard, answers(shard.seqs), engine_id=None, lease_s=30)
        close(session, shard)
    assert not finisher.finish_some()
    assert batch_row(database, batch_id)["state"] == "completed"
