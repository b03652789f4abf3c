"""Transitions of batches outside the shard protocol, and the schema they stand on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

import migrations
from models.states import Outcome
from pipeline.dispatch import Dispatcher
from runtime.clock import utc_now, week_start
from store.batches import (
    SCREENED_FAILURES,
    SCREENED_JOBS,
    batch_progress,
    batches_to_finish,
    finish,
    request_cancel,
    resume,
    screen,
)
from store.database import Database
from store.revisions import schema_revisions
from store.schema import make_partitions, migrate, partition_name
from store.shards import Claim, close, extend_leases, give_back, write_results
from tests.support.batches import (
    LEASE_S,
    answers,
    batch_row,
    chats,
    claimed,
    dispatch_all,
    execute,
    results_of,
    shards_of,
    store_batch,
)
from tests.support.silent_broker import quiet_leader


@pytest.fixture
def dispatcher(database: Database, redis_url: str) -> Iterator[Dispatcher]:
    with quiet_leader(database, redis_url) as leading:
        yield leading


def write(database: Database, taken: Claim, seqs: Sequence[int], *, outcome: Outcome = Outcome.SUCCEEDED) -> None:
    with database.transaction() as session:
        assert write_results(session, taken, answers(seqs, outcome=outcome), engine_id=None, lease_s=LEASE_S)


def run_all(database: Database) -> None:
    """Claim, answer and close every shard that waits."""
    for shard_id in dispatch_all(database):
        taken = claimed(database, shard_id)
        write(database, taken, taken.seqs)
        with database.transaction() as session:
            assert close(session, taken)


def cancel(database: Database, batch_id: UUID) -> bool:
    with database.transaction() as session:
        return request_cancel(session, batch_id)


def half_run(database: Database, folder: Path) -> tuple[UUID, Claim]:
    """A batch of 6 jobs: one shard done, one running with a result of two, one pending."""
    batch_id = store_batch(database, folder, chats(6), shard_jobs=2)
    first, second, _ = dispatch_all(database)
    taken = claimed(database, first)
    write(database, taken, taken.seqs)
    with database.transaction() as session:
        assert close(session, taken)
    running = claimed(database, second)
    write(database, running, [2])
    return batch_id, running


def wound_down(database: Database, dispatcher: Dispatcher, running: Claim) -> None:
    """The worker's heartbeat hears of it and gives its shard back; the leader does the rest."""
    dispatcher.sweep()
    with database.transaction() as session:
        assert extend_leases(session, {running.shard_id: running.fence}, lease_s=LEASE_S) == {running.shard_id: False}
        assert give_back(session, running, wait_s=0)
    dispatcher.sweep()
    dispatcher.finish_batches()


def test_a_cancelled_batch_ends_its_unfinished_jobs_and_keeps_the_others(
    database: Database, tmp_path: Path, dispatcher: Dispatcher
) -> None:
    batch_id, running = half_run(database, tmp_path)
    assert cancel(database, batch_id)
    wound_down(database, dispatcher, running)
    assert [result.error_code for result in results_of(database, batch_id)] == [
        None,
        None,
        None,
        "batch_cancelled",
        "batch_cancelled",
        "batch_cancelled",
    ]
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    assert (progress.state, progress.done, progress.failed, progress.succeeded) == ("cancelled", 6, 3, 3)
    assert (progress.is_ended, batch_row(database, batch_id)["shards_left"]) == (True, 0)
    assert not cancel(database, batch_id), "it has ended"


def test_a_shard_that_a_worker_holds_is_not_wound_down(
    database: Database, tmp_path: Path, dispatcher: Dispatcher
) -> None:
    batch_id, running = half_run(database, tmp_path)
    cancel(database, batch_id)
    dispatcher.sweep()
    dispatcher.finish_batches()
    assert batch_row(database, batch_id)["state"] == "cancelling"
    write(database, running, [3])
    with database.transaction() as session:
        assert close(session, running)
    dispatcher.finish_batches()
    assert batch_row(database, batch_id)["state"] == "cancelled"
    assert [result.error_code for result in results_of(database, batch_id)[:4]] == [None] * 4


def test_an_expired_batch_ends_its_unfinished_jobs(database: Database, tmp_path: Path, dispatcher: Dispatcher) -> None:
    batch_id, running = half_run(database, tmp_path)
    execute(database, "UPDATE batches SET expires_at = clock_timestamp() - interval '1 s'")
    wound_down(database, dispatcher, running)
    assert [result.error_code for result in results_of(database, batch_id)] == [
        None,
        None,
        None,
        "batch_expired",
        "batch_expired",
        "batch_expired",
    ]
    assert batch_row(database, batch_id)["state"] == "expired"


def test_a_paused_batch_can_be_cancelled(database: Database, tmp_path: Path, dispatcher: Dispatcher) -> None:
    batch_id = store_batch(database, tmp_path, chats(2))
    execute(database, "UPDATE batches SET paused_reason = 'by hand'")
    assert cancel(database, batch_id)
    dispatcher.tick()
    assert batch_row(database, batch_id)["state"] == "cancelled"


def screened(database: Database) -> list[tuple[UUID, str]]:
    with database.transaction() as session:
        return screen(session)


def with_failures(database: Database, folder: Path, *, failures: int) -> UUID:
    """A batch of 210 jobs of which 200 have results, so many of them failed."""
    batch_id = store_batch(database, folder, chats(SCREENED_JOBS + 10), shard_jobs=300)
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    write(database, taken, range(failures), outcome=Outcome.FAILED)
    write(database, taken, range(failures, SCREENED_JOBS))
    execute(
        database, "UPDATE results SET error_code = 'http_404', error_message = 'no such model' WHERE outcome = 'failed'"
    )
    return batch_id


def test_over_30_percent_failures_in_the_first_200_pause_a_batch_until_it_is_resumed(
    database: Database, tmp_path: Path
) -> None:
    batch_id = with_failures(database, tmp_path, failures=SCREENED_FAILURES + 1)
    [(paused, reason)] = screened(database)
    assert paused == batch_id
    assert reason == "61 of the first 200 jobs failed, most often with http_404: no such model"
    assert batch_row(database, batch_id)["paused_reason"] == reason
    with database.transaction() as session:
        assert resume(session, batch_id)
    assert screened(database) == [], "a resumed batch is not screened again"
    assert batch_row(database, batch_id)["paused_reason"] is None
    with database.transaction() as session:
        assert not resume(session, batch_id)


def test_30_percent_failures_are_let_pass(database: Database, tmp_path: Path) -> None:
    batch_id = with_failures(database, tmp_path, failures=SCREENED_FAILURES)
    assert screened(database) == []
    assert batch_row(database, batch_id)["screened"]


def test_a_batch_ends_once_every_job_has_its_result(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(5), shard_jobs=2)
    run_all(database)
    with database.transaction() as session:
        assert batches_to_finish(session) == {batch_id: 5}
        assert finish(session, batch_id) == 0
        assert finish(session, batch_id) is None, "twice is harmless"
        assert batches_to_finish(session) == {}
    row = batch_row(database, batch_id)
    assert (row["state"], row["ending"], row["ended_at"] is not None) == ("completed", "completed", True)


def test_a_job_found_without_a_result_is_run_again(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(70), shard_jobs=64)
    run_all(database)
    execute(database, "DELETE FROM results WHERE seq = ANY(:seqs)", seqs=[3, 66])
    with database.transaction() as session:
        assert finish(session, batch_id) == 2
    assert (batch_row(database, batch_id)["state"], batch_row(database, batch_id)["shards_left"]) == ("in_progress", 1)
    assert shards_of(database, batch_id)[-1].seqs == (3, 66)
    run_all(database)
    with database.transaction() as session:
        assert finish(session, batch_id) == 0
    assert batch_row(database, batch_id)["state"] == "completed"
    assert len(results_of(database, batch_id)) == 70


def test_progress_counts_each_job_once_after_a_result_was_missing(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(4))
    run_all(database)
    execute(database, "DELETE FROM results WHERE seq = 3")
    with database.transaction() as session:
        finish(session, batch_id)
    run_all(database)
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    assert (progress.done, progress.total, progress.completion_tokens) == (4, 4, 8)


def test_rows_of_a_new_batch_land_in_its_weeks_partitions(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(3))
    run_all(database)
    for table in ("jobs", "results"):
        with database.transaction() as session:
            places = session.scalars(
                text(f"SELECT DISTINCT CAST(CAST(tableoid AS regclass) AS text) FROM {table} WHERE batch_id = :id"),
                {"id": batch_id},
            ).all()
        assert places == [partition_name(table, week_start(utc_now()))]


def test_partitions_are_made_for_four_weeks_ahead_and_making_them_twice_is_harmless(database: Database) -> None:
    def partitions() -> list[str]:
        with database.transaction() as session:
            return sorted(session.scalars(text("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'")))

    before = partitions()
    assert len(before) == 2 * (1 + 5), "the default one, this week and four more, of two tables"
    make_partitions(database, now=utc_now())
    assert partitions() == before


def test_migrating_twice_is_harmless(database: Database) -> None:
    migrate(database)
    with database.transaction() as session:
        revisions = schema_revisions(session)
    assert revisions.current == revisions.newest


def test_the_migrated_schema_is_the_one_in_models(database: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.transaction() as session:
        config.attributes["connection"] = session.connection()
        command.check(config)
