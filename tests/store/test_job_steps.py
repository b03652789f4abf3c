"""Finished steps in Postgres, under the fence, and in Redis, where the first reply stands."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import redis
from sqlalchemy import text

from store.database import Database
from store.shards import Claim, close, recover_dead_leases, write_results
from store.step_states import STEPS_PREFIX, TTL_S, StepStates
from store.steps import FinishedStep, delete_steps, steps_of, write_steps
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, execute, store_batch
from tests.support.conversing import NOBODY, store_lines, talk


def taken_shard(database: Database, folder: Path, *, jobs: int = 3) -> Claim:
    store_batch(database, folder, chats(jobs))
    [shard_id] = dispatch_all(database)
    return claimed(database, shard_id)


def written(database: Database, claim: Claim, *steps: FinishedStep) -> bool:
    with database.transaction() as session:
        return write_steps(session, claim, steps, lease_s=LEASE_S)


def died(database: Database) -> int:
    """What recovery counts as crashes in a row of the one shard, whose holder dies now."""
    execute(database, "UPDATE shards SET lease_until = clock_timestamp() - interval '1 s'")
    with database.transaction() as session:
        [recovered] = recover_dead_leases(session, lease_s=1.0)
    return recovered.crashes


def test_steps_are_found_by_job_and_the_first_reply_stays(database: Database, tmp_path: Path) -> None:
    taken = taken_shard(database, tmp_path)
    assert written(database, taken, FinishedStep(0, "turn-1", "a"), FinishedStep(0, "turn-2", "b"))
    assert written(database, taken, FinishedStep(0, "turn-1", "other"), FinishedStep(2, "turn-1", "c"))
    with database.transaction() as session:
        assert steps_of(session, taken.batch_id, [0, 1, 2]) == {
            0: {"turn-1": "a", "turn-2": "b"},
            2: {"turn-1": "c"},
        }
        delete_steps(session, taken.batch_id, [0])
        assert steps_of(session, taken.batch_id, [0, 2]) == {2: {"turn-1": "c"}}
        assert steps_of(session, uuid4(), [0, 2]) == {}


def test_an_attempt_that_has_lost_its_fence_writes_no_step(database: Database, tmp_path: Path) -> None:
    taken = taken_shard(database, tmp_path)
    died(database)
    assert not written(database, taken, FinishedStep(0, "turn-1", "a"))
    with database.transaction() as session:
        assert steps_of(session, taken.batch_id, [0]) == {}


def test_an_attempt_that_wrote_a_new_step_has_not_crashed(database: Database, tmp_path: Path) -> None:
    taken = taken_shard(database, tmp_path)
    for turn in range(3):
        assert written(database, taken, FinishedStep(0, f"turn-{turn}", "a"))
        assert died(database) == 0
        [shard_id] = dispatch_all(database)
        taken = claimed(database, shard_id)
    for crashes in (1, 2):
        assert written(database, taken, FinishedStep(0, "turn-0", "known"))
        assert died(database) == crashes, "it got no further"
        [shard_id] = dispatch_all(database)
        taken = claimed(database, shard_id)
    with database.transaction() as session:
        write_results(session, taken, answers(taken.seqs), engine_id=None, lease_s=LEASE_S)
        assert close(session, taken)


def test_the_first_reply_that_redis_keeps_stands(redis_url: str) -> None:
    states, other, batch_id = StepStates(redis_url), StepStates(redis_url), uuid4()
    try:
        assert states.keep(batch_id, 7, "turn-1", '{"a":"é"}') == '{"a":"é"}'
        assert other.keep(batch_id, 7, "turn-1", "late") == '{"a":"é"}'
        assert other.keep(batch_id, 7, "turn-2", "b") == "b"
        assert other.keep(batch_id, 8, "turn-1", "x" * 2_000_000) is None
        assert states.find(batch_id, [6, 7, 8]) == {7: {"turn-1": '{"a":"é"}', "turn-2": "b"}}
        with redis.Redis.from_url(redis_url) as client:
            ttl_s = client.ttl(f"{STEPS_PREFIX}{batch_id.hex}:7")
        assert isinstance(ttl_s, int) and TTL_S - 60 < ttl_s <= TTL_S
        states.forget(batch_id, [7, 8])
        assert other.find(batch_id, [7]) == {}
    finally:
        states.close()
        other.close()


def test_a_redis_that_is_down_keeps_and_knows_nothing() -> None:
    states = StepStates(NOBODY)
    assert (states.keep(uuid4(), 0, "turn-1", "a"), states.find(uuid4(), [0])) == (None, {})
    states.forget(uuid4(), [0])
    states.close()


def test_a_line_whose_answer_depends_on_more_than_its_body_neither_takes_nor_gives_a_result(
    database: Database, tmp_path: Path
) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    plain, turns = {"body": {"model": "scripted", **body}}, talk("and?", body=body)
    found = {"body": {"model": "scripted", **body}, "stoker": {"collection": "papers"}}
    earlier = store_lines(database, tmp_path, [plain, turns, plain, found])
    execute(
        database,
        "INSERT INTO results (batch_id, seq, outcome, source, prompt_tokens, completion_tokens, cached_tokens, "
        "reasoning_tokens, duration_ms) SELECT batch_id, seq, 'succeeded', 'engine', 0, 0, 0, 0, 0 FROM jobs",
    )
    execute(database, "UPDATE batches SET state = 'completed', ended_at = clock_timestamp()")
    later = store_lines(database, tmp_path, [plain, turns, turns, found], of=earlier)
    with database.transaction() as session:
        taken = session.scalars(text("SELECT seq FROM results WHERE batch_id = :id"), {"id": later}).all()
    assert taken == [0]
    again = store_lines(database, tmp_path, [plain, plain], of=earlier)
    with database.transaction() as session:
        taken = session.scalars(text("SELECT seq FROM results WHERE batch_id = :id"), {"id": again}).all()
    assert taken == [0]
