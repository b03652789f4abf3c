"""PROTOCOL.md, statement by statement."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text

from models.states import Outcome
from pipeline.dispatch import Dispatcher
from runtime.clock import utc_now
from store.database import Database, Session
from store.shards import (
    CRASHES_TO_HALVE,
    CRASHES_TO_POISON,
    Claim,
    Retry,
    claim,
    claim_next,
    close,
    extend_leases,
    give_back,
    is_alone,
    is_reserved,
    load_jobs,
    recover_dead_leases,
    write_results,
    write_retries,
)
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

SHORT_LEASE_S = 0.01


@pytest.fixture
def dispatcher(database: Database, redis_url: str) -> Iterator[Dispatcher]:
    with quiet_leader(database, redis_url, lease_s=SHORT_LEASE_S) as leading:
        yield leading


def write(database: Database, taken: Claim, seqs: Sequence[int]) -> int | None:
    with database.transaction() as session:
        return write_results(session, taken, answers(seqs), engine_id=None, lease_s=LEASE_S)


def end_lease(database: Database, shard_id: int) -> None:
    execute(database, "UPDATE shards SET lease_until = clock_timestamp() - interval '1 s' WHERE id = :id", id=shard_id)


def lock_shard(session: Session, taken: Claim) -> None:
    session.execute(text("SELECT FROM shards WHERE id = :id FOR NO KEY UPDATE"), {"id": taken.shard_id})


def recover(database: Database) -> list[int]:
    with database.transaction() as session:
        return [shard.shard_id for shard in recover_dead_leases(session, lease_s=0.0)]


def taken_over(database: Database, shard_id: int) -> Claim:
    """The claim of a second worker after the first one's lease ran out."""
    end_lease(database, shard_id)
    assert recover(database) == [shard_id]
    assert dispatch_all(database) == [shard_id]
    return claimed(database, shard_id)


def one_shard(database: Database, folder: Path, jobs: int = 4) -> tuple[UUID, int]:
    """A batch of one dispatched shard."""
    batch_id = store_batch(database, folder, chats(jobs))
    [shard_id] = dispatch_all(database)
    return batch_id, shard_id


def test_a_claim_takes_a_new_fence_and_the_whole_shard(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    before = shards_of(database, batch_id)[0].fence
    taken = claimed(database, shard_id)
    assert (taken.shard_id, taken.batch_id, taken.seqs, taken.runnable) == (shard_id, batch_id, (0, 1, 2, 3), True)
    assert taken.fence == before + 1
    assert shards_of(database, batch_id)[0].state == "running"


def test_a_second_claim_gets_nothing(database: Database, tmp_path: Path) -> None:
    _, shard_id = one_shard(database, tmp_path)
    claimed(database, shard_id)
    with database.transaction() as session:
        assert claim(session, shard_id, holder="second", lease_s=LEASE_S) is None
        assert claim_next(session, holder="second", lease_s=LEASE_S) is None


def test_of_many_claims_at_once_one_wins(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    start = threading.Barrier(8)

    def race(number: int) -> Claim | None:
        start.wait()
        with database.transaction() as session:
            return claim(session, shard_id, holder=f"racer {number}", lease_s=LEASE_S)

    with ThreadPoolExecutor(8) as pool:
        winners = [taken for taken in pool.map(race, range(8)) if taken is not None]
    assert len(winners) == 1
    assert shards_of(database, batch_id)[0].fence == winners[0].fence


def test_the_next_claim_takes_what_was_dispatched_first(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(3), shard_jobs=1)
    first, second, third = dispatch_all(database)
    execute(database, "UPDATE shards SET dispatched_at = dispatched_at - interval '1 s' WHERE id = :id", id=second)
    taken = []
    for _ in range(3):
        with database.transaction() as session:
            found = claim_next(session, holder="test", lease_s=LEASE_S)
        assert found is not None
        taken.append(found.shard_id)
    assert taken == [second, first, third]


def test_a_claim_says_when_its_batch_may_not_run(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    execute(database, "UPDATE batches SET paused_reason = 'by hand' WHERE id = :id", id=batch_id)
    assert not claimed(database, shard_id).runnable


def test_jobs_are_loaded_in_the_shards_order_without_finished_and_waiting_ones(
    database: Database, tmp_path: Path
) -> None:
    _, shard_id = one_shard(database, tmp_path)
    execute(database, "UPDATE shards SET seqs = '{3,1,0,2}' WHERE id = :id", id=shard_id)
    taken = claimed(database, shard_id)
    write(database, taken, [1])
    due = utc_now() + timedelta(minutes=5)
    with database.transaction() as session:
        assert write_retries(
            session,
            taken,
            [
                Retry(seq=0, tries=2, engine_deaths=0, not_before=due, error="later"),
                Retry(seq=2, tries=1, engine_deaths=0, not_before=utc_now() - timedelta(seconds=1), error="now"),
            ],
        )
        loaded = load_jobs(session, taken)
    assert [(job.seq, job.tries) for job in loaded.jobs] == [(3, 0), (2, 1)]
    assert loaded.next_due == due


def test_a_heartbeat_extends_the_lease_and_says_whether_the_batch_may_go_on(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    taken = claimed(database, shard_id, lease_s=SHORT_LEASE_S)
    with database.transaction() as session:
        assert extend_leases(session, {shard_id: taken.fence}, lease_s=LEASE_S) == {shard_id: True}
    assert recover(database) == []
    execute(database, "UPDATE batches SET paused_reason = 'by hand' WHERE id = :id", id=batch_id)
    with database.transaction() as session:
        assert extend_leases(session, {shard_id: taken.fence}, lease_s=LEASE_S) == {shard_id: False}


def test_a_heartbeat_after_a_takeover_is_refused(database: Database, tmp_path: Path) -> None:
    _, shard_id = one_shard(database, tmp_path)
    old = claimed(database, shard_id)
    new = taken_over(database, shard_id)
    with database.transaction() as session:
        assert extend_leases(session, {shard_id: old.fence}, lease_s=LEASE_S) == {}
        assert extend_leases(session, {shard_id: new.fence}, lease_s=LEASE_S) == {shard_id: True}


def test_a_heartbeat_passes_by_a_shard_that_is_locked(database: Database, tmp_path: Path) -> None:
    """A leader frozen in the middle of a fill holds its batch's row: a child's close waits, its leases do not."""
    store_batch(database, tmp_path, chats(8), shard_jobs=4)
    closing, running = (claimed(database, shard_id, lease_s=SHORT_LEASE_S) for shard_id in dispatch_all(database))
    with database.transaction() as holder:
        lock_shard(holder, closing)
        with database.transaction() as session:
            session.execute(text("SET LOCAL lock_timeout = '2s'"))
            held = {taken.shard_id: taken.fence for taken in (closing, running)}
            assert extend_leases(session, held, lease_s=LEASE_S) == {closing.shard_id: True, running.shard_id: True}
    assert recover(database) == [closing.shard_id], "the other one's lease was kept"


def test_a_late_write_of_a_zombie_changes_nothing(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    zombie = claimed(database, shard_id)
    new = taken_over(database, shard_id)
    write(database, new, [0])
    before = shards_of(database, batch_id), results_of(database, batch_id)
    assert write(database, zombie, [0, 1, 2, 3]) is None
    with database.transaction() as session:
        assert not write_retries(
            session, zombie, [Retry(seq=1, tries=1, engine_deaths=0, not_before=utc_now(), error="late")]
        )
        assert not close(session, zombie)
        assert not give_back(session, zombie, wait_s=0)
        assert [job.seq for job in load_jobs(session, new).jobs] == [1, 2, 3]
    assert (shards_of(database, batch_id), results_of(database, batch_id)) == before


def test_a_zombie_writes_nothing_between_the_takeover_and_the_next_claim(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    zombie = claimed(database, shard_id)
    end_lease(database, shard_id)
    recover(database)
    assert write(database, zombie, [0]) is None
    assert results_of(database, batch_id) == []


def test_a_write_repeated_after_an_ambiguous_commit_counts_nothing_twice(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    taken = claimed(database, shard_id)
    assert write(database, taken, [0, 1]) == 2
    assert write(database, taken, [0, 1]) == 2
    assert write(database, taken, [1, 2]) == 3
    shard = shards_of(database, batch_id)[0]
    assert (shard.done, shard.completion_tokens) == (3, 6)
    assert [result.seq for result in results_of(database, batch_id)] == [0, 1, 2]


def test_counters_follow_the_outcomes(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    taken = claimed(database, shard_id)
    results = [answers([seq], outcome=outcome)[0] for seq, outcome in enumerate(Outcome)]
    with database.transaction() as session:
        write_results(session, taken, results, engine_id=None, lease_s=LEASE_S)
    shard = shards_of(database, batch_id)[0]
    assert (shard.done, shard.failed, shard.truncated, shard.empty) == (4, 1, 1, 1)


def test_a_shard_closes_only_when_every_job_is_done(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    taken = claimed(database, shard_id)
    write(database, taken, [0, 1, 2])
    with database.transaction() as session:
        assert not close(session, taken)
    write(database, taken, [3])
    with database.transaction() as session:
        assert close(session, taken)
    with database.transaction() as session:
        assert not close(session, taken)
    assert shards_of(database, batch_id)[0].state == "done"
    assert (batch_row(database, batch_id)["shards_left"], batch_row(database, batch_id)["state"]) == (0, "finalizing")


def test_shards_closed_at_once_have_exactly_one_last_closer(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(16), shard_jobs=1)
    taken = [claimed(database, shard_id) for shard_id in dispatch_all(database)]
    for one in taken:
        write(database, one, list(one.seqs))
    execute(database, "CREATE TABLE turns (state text)")
    execute(
        database,
        """
        CREATE FUNCTION note_turn() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO turns VALUES (new.state); RETURN new; END'""",
    )
    execute(
        database,
        """
        CREATE TRIGGER turned AFTER UPDATE ON batches FOR EACH ROW
        WHEN (old.state IS DISTINCT FROM new.state) EXECUTE FUNCTION note_turn()""",
    )
    start = threading.Barrier(16)

    def close_one(one: Claim) -> bool:
        start.wait()
        with database.transaction() as session:
            return close(session, one)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(close_one, taken))
    with database.connection() as connection:
        assert connection.execute("SELECT state FROM turns").fetchall() == [("finalizing",)]
    assert batch_row(database, batch_id)["shards_left"] == 0


def test_a_given_back_shard_is_dispatched_again_after_its_wait(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    taken = claimed(database, shard_id)
    write(database, taken, [0])
    with database.transaction() as session:
        assert give_back(session, taken, wait_s=3600)
    assert dispatch_all(database) == []
    execute(database, "UPDATE shards SET not_before = clock_timestamp() WHERE id = :id", id=shard_id)
    assert dispatch_all(database) == [shard_id]
    again = claimed(database, shard_id)
    with database.transaction() as session:
        assert [job.seq for job in load_jobs(session, again).jobs] == [1, 2, 3]
    assert shards_of(database, batch_id)[0].crashes == 0


def test_a_living_lease_is_left_alone(database: Database, tmp_path: Path) -> None:
    _, shard_id = one_shard(database, tmp_path)
    claimed(database, shard_id)
    assert recover(database) == []


def test_a_crash_counts_only_if_the_attempt_committed_nothing(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path)
    claimed(database, shard_id)
    second = taken_over(database, shard_id)
    assert shards_of(database, batch_id)[0].crashes == 1
    taken_over(database, shard_id)
    assert shards_of(database, batch_id)[0].crashes == 2
    third = taken_over(database, shard_id)
    assert third.fence > second.fence
    write(database, third, [0])
    taken_over(database, shard_id)
    assert shards_of(database, batch_id)[0].crashes == 0
    taken_over(database, shard_id)
    assert shards_of(database, batch_id)[0].crashes == 1, "a result of an earlier attempt does not excuse this one"


def crash(database: Database, dispatcher: Dispatcher, shard_id: int) -> None:
    """A worker claims the shard and is gone; the leader's sweep finds it."""
    assert shard_id in dispatch_all(database)
    claimed(database, shard_id)
    end_lease(database, shard_id)
    dispatcher.sweep()


def test_three_crashes_in_a_row_halve_a_shard(database: Database, tmp_path: Path, dispatcher: Dispatcher) -> None:
    batch_id, shard_id = one_shard(database, tmp_path, jobs=9)
    taken = claimed(database, shard_id)
    write(database, taken, [4])
    with database.transaction() as session:
        give_back(session, taken, wait_s=0)
    for count in range(CRASHES_TO_HALVE):
        assert len(shards_of(database, batch_id)) == 1, f"after {count} crashes"
        crash(database, dispatcher, shard_id)
    parent, left, right = shards_of(database, batch_id)
    assert (parent.seqs, parent.state, parent.done) == ((4,), "done", 1)
    assert (left.seqs, right.seqs) == ((0, 1, 2, 3), (5, 6, 7, 8))
    assert (left.state, left.crashes, right.state, right.crashes) == ("pending", 0, "pending", 0)
    assert batch_row(database, batch_id)["shards_left"] == 2


def test_a_job_that_kills_alone_ends_as_poison_and_the_others_do_not(
    database: Database, tmp_path: Path, dispatcher: Dispatcher
) -> None:
    killer = 2
    batch_id = store_batch(database, tmp_path, chats(5), shard_jobs=5)
    deaths = 0
    while batch_row(database, batch_id)["state"] == "in_progress":
        for shard_id in dispatch_all(database):
            taken = claimed(database, shard_id)
            with database.transaction() as session:
                seqs = [job.seq for job in load_jobs(session, taken).jobs]
            if killer in seqs:
                deaths += 1
                end_lease(database, shard_id)
                continue
            write(database, taken, seqs)
            with database.transaction() as session:
                assert close(session, taken)
        dispatcher.sweep()
        assert deaths < 50
    results = results_of(database, batch_id)
    assert [result.seq for result in results] == [0, 1, 2, 3, 4]
    assert [result.seq for result in results if result.outcome == "failed"] == [killer]
    assert results[killer].error_code == "poison_job"
    assert batch_row(database, batch_id)["shards_left"] == 0
    assert sum(shard.done for shard in shards_of(database, batch_id)) == 5


@pytest.mark.parametrize("shard_jobs", [1, 4])
def test_a_job_that_takes_its_whole_worker_down_does_not_take_the_blame_of_others_with_it(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, shard_jobs: int
) -> None:
    """Four children of one worker; nothing is ever written before the killer kills them all."""
    killer = 5
    batch_id = store_batch(database, tmp_path, chats(16), shard_jobs=shard_jobs)

    def finish(taken: Claim) -> None:
        write(database, taken, taken.seqs)
        with database.transaction() as session:
            assert close(session, taken)

    deaths = 0
    while batch_row(database, batch_id)["state"] == "in_progress":
        dispatch_all(database)
        beside: list[Claim] = []
        apart: Claim | None = None
        with database.transaction() as session:
            while len(beside) < 4 and apart is None:
                taken = claim_next(session, holder="child", lease_s=LEASE_S, engine="shared", worker="one")
                if taken is None:
                    break
                if taken.runs_alone:
                    apart = taken
                else:
                    beside.append(taken)
            assert apart is None or is_alone(session, apart) == (not beside)
            assert apart is None or is_reserved(session, engine="other", worker="one")
            assert not is_reserved(session, engine="shared", worker="another")
        for together in (beside, [apart] if apart else []):
            if any(killer in taken.seqs for taken in together):
                deaths += 1
                execute(database, "UPDATE shards SET lease_until = '2000-01-01' WHERE state = 'running'")
                break
            for taken in together:
                finish(taken)
        dispatcher.sweep()
        assert deaths < 50
    assert [result.seq for result in results_of(database, batch_id) if result.outcome == "failed"] == [killer]
    assert len(results_of(database, batch_id)) == 16
    print(f"\n{deaths} deaths")


def test_a_committed_result_takes_a_shard_s_crashes_away(database: Database, tmp_path: Path) -> None:
    batch_id, shard_id = one_shard(database, tmp_path, jobs=3)
    execute(database, "UPDATE shards SET crashes = 2 WHERE id = :id", id=shard_id)
    taken = claimed(database, shard_id)
    with database.transaction() as session:
        give_back(session, taken, wait_s=0)
    assert shards_of(database, batch_id)[0].crashes == 2
    assert dispatch_all(database) == [shard_id]
    taken = claimed(database, shard_id)
    write(database, taken, [0])
    with database.transaction() as session:
        give_back(session, taken, wait_s=0)
    assert shards_of(database, batch_id)[0].crashes == 0


def test_a_job_alone_in_its_shard_is_poison_after_six_deaths(
    database: Database, tmp_path: Path, dispatcher: Dispatcher
) -> None:
    batch_id = store_batch(database, tmp_path, chats(1))
    shard_id = shards_of(database, batch_id)[0].id
    for count in range(CRASHES_TO_POISON):
        assert results_of(database, batch_id) == [], f"after {count} deaths"
        crash(database, dispatcher, shard_id)
    assert [result.error_code for result in results_of(database, batch_id)] == ["poison_job"]
    assert f"{CRASHES_TO_POISON} workers" in (results_of(database, batch_id)[0].error_message or "")
    assert batch_row(database, batch_id)["state"] == "finalizing"


def test_a_poison_message_counts_only_the_deaths_of_the_job_alone(
    database: Database, tmp_path: Path, dispatcher: Dispatcher
) -> None:
    batch_id = store_batch(database, tmp_path, chats(2))
    alone_deaths = 0
    while not results_of(database, batch_id):
        for shard_id in dispatch_all(database):
            taken = claimed(database, shard_id)
            alone_deaths += taken.seqs == (0,)
            end_lease(database, shard_id)
        dispatcher.sweep()
    message = results_of(database, batch_id)[0].error_message or ""
    assert f"at least {alone_deaths} of them while it was alone" in message


def test_halving_keeps_every_seq_exactly_once(database: Database, tmp_path: Path, dispatcher: Dispatcher) -> None:
    batch_id = store_batch(database, tmp_path, chats(11), shard_jobs=11)
    for _ in range(4 * CRASHES_TO_HALVE):
        for shard_id in dispatch_all(database):
            claimed(database, shard_id)
            end_lease(database, shard_id)
        dispatcher.sweep()
        shards = shards_of(database, batch_id)
        assert sorted(seq for shard in shards for seq in shard.seqs) == list(range(11))
        unfinished = [shard for shard in shards if shard.state != "done"]
        assert batch_row(database, batch_id)["shards_left"] == len(unfinished)


def test_halves_do_not_hide_the_shards_that_were_never_sent(
    database: Database, tmp_path: Path, dispatcher: Dispatcher
) -> None:
    batch_id = store_batch(database, tmp_path, chats(20), shard_jobs=2)
    first = shards_of(database, batch_id)[0].id
    never_sent = {shard.id for shard in shards_of(database, batch_id)[1:]}
    execute(database, "UPDATE shards SET state = 'dispatched' WHERE id = :id", id=first)
    for _ in range(CRASHES_TO_HALVE):
        claimed(database, first)
        end_lease(database, first)
        dispatcher.sweep()
        execute(database, "UPDATE shards SET state = 'dispatched' WHERE id = :id AND state = 'pending'", id=first)
    halves = {shard.id for shard in shards_of(database, batch_id)} - never_sent - {first}
    assert len(halves) == 2
    dispatcher.fill_window()  # its window is 2: the halves are due and go first
    execute(database, "DELETE FROM shards WHERE id = ANY(:ids)", ids=sorted(halves))
    assert set(dispatch_all(database)) == never_sent
