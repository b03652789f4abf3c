"""How the leader ends batches: small ones at once, a large one in parts."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from sqlalchemy import text
from structlog.testing import capture_logs

from pipeline.finishing import Finisher
from store.database import Database
from store.shards import close, write_results
from tests.support.batches import answers, batch_row, chats, claimed, dispatch_all, execute, store_batch


def finished(database: Database, folder: Path, *, jobs: int) -> UUID:
    """A batch whose last shard is closed."""
    batch_id = store_batch(database, folder, chats(jobs), shard_jobs=4)
    run_all(database)
    return batch_id


def run_all(database: Database) -> None:
    for shard_id in dispatch_all(database):
        shard = claimed(database, shard_id)
        with database.transaction() as session:
            write_results(session, shard, answers(shard.seqs), engine_id=None, lease_s=30)
            close(session, shard)


def state(database: Database, batch_id: UUID) -> str:
    return str(batch_row(database, batch_id)["state"])


def test_a_large_batch_is_counted_in_parts_and_neither_it_nor_small_ones_wait_for_each_other(
    database: Database, tmp_path: Path
) -> None:
    large = finished(database, tmp_path, jobs=10)
    small = [finished(database, tmp_path, jobs=1) for _ in range(6)]
    finisher = Finisher(database, counted_at_once=4, count_s=0.0)  # one turn a call

    ended = []
    while finisher.finish_some():
        ended.append([state(database, one) for one in (*small, large)].count("completed"))
    assert ended == [1, 1, 2, 2, 3, 4, 5, 6], "the large one has every second turn until its three parts are counted"
    assert state(database, large) == state(database, small[-1]) == "completed"


def test_a_batch_that_lacks_results_goes_on_and_is_counted_anew_when_it_ends_again(
    database: Database, tmp_path: Path
) -> None:
    batch_id = finished(database, tmp_path, jobs=10)
    execute(database, "DELETE FROM results WHERE batch_id = :id AND seq IN (2, 9)", id=batch_id)
    finisher = Finisher(database, counted_at_once=4, count_s=60.0)

    assert not finisher.finish_some()
    assert (batch_row(database, batch_id)["state"], batch_row(database, batch_id)["shards_left"]) == ("in_progress", 1)
    run_all(database)
    assert not finisher.finish_some()
    assert state(database, batch_id) == "completed"


def test_a_count_from_before_another_led_ends_no_batch_wrongly_and_breaks_nothing(
    database: Database, tmp_path: Path
) -> None:
    batch_id = finished(database, tmp_path, jobs=10)
    execute(database, "DELETE FROM results WHERE batch_id = :id AND seq = 2", id=batch_id)
    first, other = (Finisher(database, counted_at_once=4, count_s=seconds) for seconds in (0.0, 60.0))

    assert first.finish_some(), "three results of the first four jobs"
    assert not other.finish_some()
    run_all(database)
    assert first.finish_some()
    assert not first.finish_some()
    assert state(database, batch_id) == "completed"


def test_who_led_before_counts_anew(database: Database, tmp_path: Path) -> None:
    batch_id = finished(database, tmp_path, jobs=10)
    finisher = Finisher(database, counted_at_once=4, count_s=0.0)

    assert finisher.finish_some()
    execute(database, "DELETE FROM results WHERE batch_id = :id AND seq = 2", id=batch_id)
    finisher.forget()
    while finisher.finish_some():
        pass
    assert state(database, batch_id) == "in_progress"


def test_a_batch_that_another_transaction_holds_is_not_said_to_have_ended_and_not_counted_again(
    database: Database, tmp_path: Path
) -> None:
    batch_id = finished(database, tmp_path, jobs=3)
    finisher = Finisher(database)
    with capture_logs() as logs:
        with database.transaction() as session:
            session.execute(text("SELECT FROM batches WHERE id = :id FOR UPDATE"), {"id": batch_id})
            assert not finisher.finish_some(), "it is not asked for at once"
        assert logs == []
        execute(database, "DELETE FROM results WHERE batch_id = :id", id=batch_id)
        finisher.finish_some()
    assert [log["event"] for log in logs] == ["batch_ended"]
    assert state(database, batch_id) == "completed"
