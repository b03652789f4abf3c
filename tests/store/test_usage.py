"""What batches take of engines and endpoints is counted in the write itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from models.jobs import JobResult, Usage
from models.states import Outcome, Source
from store.batches import finish
from store.database import Database
from store.shards import Claim, close, write_and_tell, write_results
from store.usage import SINGLE, SLOTS, add_usage
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, execute, rows, store_batch

OWN, PRICED = 1, 2


def claim_of(database: Database, folder: Path, *, jobs: int) -> Claim:
    """A claimed shard of a new batch."""
    store_batch(database, folder, chats(jobs))
    return claimed(database, dispatch_all(database)[0])


def priced(seq: int, *, cost: int) -> JobResult:
    """An answer of a priced endpoint."""
    return replace(answers([seq])[0], engine_id=PRICED, cost=cost)


def write(database: Database, claim: Claim, results: list[JobResult]) -> int | None:
    """Write them as a worker whose engine is OWN."""
    with database.transaction() as session:
        return write_results(session, claim, results, engine_id=OWN, lease_s=LEASE_S)


def taken(database: Database, batch_id: UUID) -> list[tuple[Any, ...]]:
    """(engine, jobs, prompt, completion and cached tokens, cost) of a batch, by engine."""
    return rows(
        database,
        """
        SELECT engine_id, jobs, prompt_tokens, completion_tokens, cached_tokens, cost FROM usage
        WHERE batch_id = :id ORDER BY engine_id""",
        id=batch_id,
    )


def test_each_result_names_what_answered_it_and_what_that_asks(database: Database, tmp_path: Path) -> None:
    claim = claim_of(database, tmp_path, jobs=3)
    write(database, claim, [*answers([0]), priced(1, cost=70), priced(2, cost=5)])
    stored = rows(
        database, "SELECT seq, engine_id, cost FROM results WHERE batch_id = :id ORDER BY seq", id=claim.batch_id
    )
    assert stored == [(0, OWN, None), (1, PRICED, 70), (2, PRICED, 5)]
    assert taken(database, claim.batch_id) == [(OWN, 1, 3, 2, 0, 0), (PRICED, 2, 6, 4, 0, 75)]


def test_a_write_that_is_repeated_counts_what_it_inserted_once(database: Database, tmp_path: Path) -> None:
    claim = claim_of(database, tmp_path, jobs=3)
    first = [*answers([0]), priced(1, cost=70)]
    assert write(database, claim, first) == 2
    assert write(database, claim, first) == 2
    with database.transaction() as session:
        both = [*first, priced(2, cost=1)]
        assert write_and_tell(session, claim, both, engine_id=OWN, lease_s=LEASE_S) == [2]
    assert taken(database, claim.batch_id) == [(OWN, 1, 3, 2, 0, 0), (PRICED, 2, 6, 4, 0, 71)]


def test_an_attempt_without_its_fence_counts_nothing(database: Database, tmp_path: Path) -> None:
    claim = claim_of(database, tmp_path, jobs=1)
    execute(database, "UPDATE shards SET fence = fence + 1 WHERE id = :id", id=claim.shard_id)
    assert write(database, claim, [priced(0, cost=1)]) is None
    assert taken(database, claim.batch_id) == []


def test_what_no_engine_did_is_not_counted(database: Database, tmp_path: Path) -> None:
    claim = replace(claim_of(database, tmp_path, jobs=4), followers=True)
    leader, other, third, follower = range(4)
    execute(
        database,
        "INSERT INTO followers (batch_id, seq, leader) VALUES (:id, :seq, :leader)",
        id=claim.batch_id,
        seq=follower,
        leader=leader,
    )
    served = JobResult(seq=other, outcome=Outcome.SUCCEEDED, source=Source.EXACT, entry=1, status_code=200)
    lost = JobResult(seq=third, outcome=Outcome.FAILED, source=Source.NONE, error_code="timeout")
    assert write(database, claim, [priced(leader, cost=9), served, lost]) == 3
    assert rows(database, "SELECT count(*), count(cost) FROM results") == [(4, 1)]  # its follower costs nothing
    assert taken(database, claim.batch_id) == [(PRICED, 1, 3, 2, 0, 9)]


def test_when_a_batch_ends_its_slots_become_one_row_an_engine(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(3), shard_jobs=1)
    for number, shard_id in enumerate(dispatch_all(database)):
        claim = claimed(database, shard_id)
        write(database, claim, [priced(claim.seqs[0], cost=number)])
        with database.transaction() as session:
            assert close(session, claim)
    assert len(taken(database, batch_id)) == 3
    with database.transaction() as session:
        assert finish(session, batch_id) == 0
    assert taken(database, batch_id) == [(PRICED, 3, 9, 6, 0, 3)]


def test_single_requests_add_up_under_no_batch(database: Database) -> None:
    with database.transaction() as session:
        for number in range(3):
            add_usage(
                session,
                tenant="t",
                key_id="key",
                engine_id=PRICED,
                usage=Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4),
                cost=number,
                slot=SLOTS + 1,
            )
    assert taken(database, SINGLE) == [(PRICED, 3, 30, 6, 12, 3)]
