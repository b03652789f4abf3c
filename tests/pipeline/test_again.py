"""Running lines again: retry of failed ones, results taken over from an earlier batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from models.jobs import failed
from models.lines import SubmitOptions
from models.states import Outcome, Priority, Trust
from pipeline.again import retry_batch
from pipeline.submit import Submitted, Wishes, submit_file
from runtime.errors import BadInput, NotFound
from runtime.settings import LimitSettings, Settings, ShardSettings
from store.again import take_results
from store.batches import batch_progress, batches_to_finish, finish, request_cancel, shards_to_wind_down
from store.budget_tables import MONEY
from store.database import Database
from store.shards import close, load_jobs, write_results
from tests.support.batches import (
    CHAT,
    LEASE_S,
    answers,
    batch_row,
    chat,
    chats,
    claimed,
    dispatch_all,
    execute,
    results_of,
    shards_of,
    store_batch,
)

Bodies = Sequence[dict[str, Any]]
SETTINGS = Settings.model_construct(shard=ShardSettings(max_jobs=4), limits=LimitSettings(window_s=600))


def run_all(database: Database, *, failing: frozenset[int] = frozenset()) -> None:
    """Claim, answer and close every shard that waits, and end the batches."""
    for shard_id in dispatch_all(database):
        taken = claimed(database, shard_id)
        with database.transaction() as session:
            seqs = [job.seq for job in load_jobs(session, taken).jobs]
            good = answers(seq for seq in seqs if seq not in failing)
            bad = [failed(seq, code="timeout", message="late") for seq in seqs if seq in failing]
            write_results(session, taken, [*good, *bad], engine_id=None, lease_s=LEASE_S)
            assert close(session, taken)
    with database.transaction() as session:
        for batch_id in batches_to_finish(session):
            assert finish(session, batch_id) == 0


def jobs_of(database: Database, batch_id: UUID) -> list[tuple[int, str, str]]:
    with database.transaction() as session:
        rows = session.execute(
            text("SELECT seq, custom_id, body FROM jobs WHERE batch_id = :id ORDER BY seq"), {"id": batch_id}
        )
        return [tuple(row) for row in rows]


def cuts_of(database: Database, batch_id: UUID) -> list[tuple[list[int], int]]:
    """(seqs, tokens) of each shard that has jobs to run."""
    with database.transaction() as session:
        rows = session.execute(
            text("SELECT seqs, tokens FROM shards WHERE batch_id = :id AND state <> 'done' ORDER BY id"),
            {"id": batch_id},
        )
        return [(list(seqs), tokens) for seqs, tokens in rows]


def retry(database: Database, batch_id: UUID, **wishes: Any) -> Submitted:
    asked: dict[str, Any] = {"settings": SETTINGS, "reuse": True}
    return retry_batch(database, batch_id, **(asked | wishes))


def submit(database: Database, folder: Path, bodies: Bodies, *, of: UUID | None = None, url: str = CHAT) -> Submitted:
    file = folder / f"{uuid4().hex}.jsonl"
    lines = [
        json.dumps({"custom_id": f"id-{seq}", "method": "POST", "url": url, "body": body})
        for seq, body in enumerate(bodies)
    ]
    file.write_text("\n".join(lines) + "\n")
    options = SubmitOptions(max_output_tokens=64)
    wishes = Wishes(results_of=of)
    return submit_file(
        database, file, options=options, settings=SETTINGS, served_models=None, reuse=False, wishes=wishes
    )


def assert_counters_equal_rows(database: Database, batch_id: UUID) -> None:
    shards, results, row = shards_of(database, batch_id), results_of(database, batch_id), batch_row(database, batch_id)
    assert sum(shard.done for shard in shards) == len(results)
    assert sum(shard.failed for shard in shards) == sum(result.outcome == "failed" for result in results)
    assert row["shards_left"] == sum(shard.state != "done" for shard in shards)
    assert sorted(seq for shard in shards for seq in shard.seqs) == list(range(row["total"]))


def test_a_retry_may_leave_own_endpoints_within_a_budget_of_its_own(database: Database, tmp_path: Path) -> None:
    earlier = store_batch(database, tmp_path, chats(4))
    run_all(database, failing=frozenset({1}))
    with pytest.raises(BadInput, match="add --trust external"):
        retry_batch(database, earlier, settings=SETTINGS, reuse=False, budget_nanos=5)
    made = retry_batch(database, earlier, settings=SETTINGS, reuse=False, trust=Trust.EXTERNAL, budget_nanos=5).batch_id
    assert batch_row(database, made)["options"]["trust"] == "external"
    with database.transaction() as session:
        assert [budget.cap for budget in MONEY.of_batch(session, made)] == [5]


def test_retry_makes_a_new_batch_of_the_failed_lines(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(20), shard_jobs=8)
    run_all(database, failing=frozenset({0, 3, 7, 8, 12, 19}))
    again = retry(database, first)
    assert (again.total, again.reused) == (6, False)
    old = jobs_of(database, first)
    assert [(custom_id, body) for _, custom_id, body in jobs_of(database, again.batch_id)] == [
        (custom_id, body) for seq, custom_id, body in old if seq in {0, 3, 7, 8, 12, 19}
    ]
    assert [seqs for seqs, _ in cuts_of(database, again.batch_id)] == [[0, 1, 2, 3], [4, 5]]
    row = batch_row(database, again.batch_id)
    assert (row["state"], row["retry_of"], row["total"], row["endpoint"]) == ("in_progress", first, 6, CHAT)
    assert row["options"] == batch_row(database, first)["options"]
    assert (row["expires_at"] - row["in_progress_at"]).total_seconds() == pytest.approx(600, abs=1)
    run_all(database)
    with database.transaction() as session:
        progress = batch_progress(session, again.batch_id, tenant="local")
    assert (progress.state, progress.succeeded, progress.retry_of) == ("completed", 6, first)
    assert batch_row(database, first)["state"] == "completed", "the old batch stays as it ended"
    assert_counters_equal_rows(database, again.batch_id)


@pytest.mark.parametrize(
    ("url", "bodies"),
    [
        (CHAT, [chat("x"), chat("\0 nul", n=3), chat("y", max_tokens=7), chat("z", max_completion_tokens=5)]),
        (CHAT, [chat("x", max_tokens=None), chat("x", max_completion_tokens=None, max_tokens=9, n=None)]),
        (CHAT, [{**chat("x"), "tools": [{"max_tokens": 1}]}, chat("émoji 😀")]),
        (
            "/v1/completions",
            [
                {"model": "m", "prompt": "one"},
                {"model": "m", "prompt": ["one", "two", "three"], "n": 2},
                {"model": "m", "prompt": [1, 2, 3], "max_tokens": 5},
                {"model": "m", "prompt": [[1, 2], [3]]},
            ],
        ),
        ("/v1/embeddings", [{"model": "m", "input": "x"}, {"model": "m", "input": ["x", "y"]}]),
    ],
)
def test_a_retry_cuts_its_shards_as_the_submit_of_these_lines_did(
    database: Database, tmp_path: Path, url: str, bodies: Bodies
) -> None:
    first = submit(database, tmp_path, bodies, url=url).batch_id
    cuts = cuts_of(database, first)
    assert all(tokens > 0 for _, tokens in cuts)
    run_all(database, failing=frozenset(range(len(bodies))))
    assert cuts_of(database, retry(database, first).batch_id) == cuts


def test_lines_that_a_cancel_ended_are_retried(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(6), shard_jobs=6)
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    ended = [failed(seq, code="batch_cancelled", message="cancelled") for seq in range(2, 6)]
    with database.transaction() as session:
        assert request_cancel(session, first)
        assert shards_to_wind_down(session, limit=9) == []
        write_results(session, taken, [*answers([0, 1]), *ended], engine_id=None, lease_s=LEASE_S)
        assert close(session, taken)
        assert finish(session, first) == 0
    again = retry(database, first)
    assert [custom_id for _, custom_id, _ in jobs_of(database, again.batch_id)] == ["id-2", "id-3", "id-4", "id-5"]


def test_a_retry_of_a_retry_is_another_batch(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(3))
    run_all(database, failing=frozenset({1, 2}))
    second = retry(database, first).batch_id
    run_all(database, failing=frozenset({1}))
    third = retry(database, second)
    assert [custom_id for _, custom_id, _ in jobs_of(database, third.batch_id)] == ["id-2"]


def test_a_second_retry_within_the_hour_is_the_first_one_unless_forced(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(3))
    run_all(database, failing=frozenset({1}))
    again = retry(database, first)
    assert retry(database, first) == Submitted(again.batch_id, 1, reused=True)
    run_all(database)
    assert retry(database, first).reused, "it completed"
    forced = retry(database, first, reuse=False, priority=Priority.HIGH, weight=2.5)
    assert not forced.reused
    row = batch_row(database, forced.batch_id)
    assert (row["priority"], row["weight"]) == ("high", 2.5)


def test_a_retry_is_refused_with_the_remedy(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(3))
    with pytest.raises(BadInput, match=r"still runs .*stoker watch"):
        retry(database, first)
    run_all(database)
    with pytest.raises(BadInput, match="no failed line"):
        retry(database, first)
    with pytest.raises(NotFound):
        retry(database, first, tenant="another")
    execute(database, "UPDATE batches SET deleted_at = clock_timestamp()")
    with pytest.raises(NotFound):
        retry(database, first)


def test_a_retry_of_more_than_a_chunk_is_whole(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(60), shard_jobs=16)
    run_all(database, failing=frozenset(range(0, 60, 2)))
    again = retry(database, first, chunk_jobs=7)
    assert [custom_id for _, custom_id, _ in jobs_of(database, again.batch_id)] == [
        f"id-{seq}" for seq in range(0, 60, 2)
    ]
    assert_counters_equal_rows(database, again.batch_id)


def test_only_new_changed_and_failed_lines_run_when_results_are_reused(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(20))
    run_all(database, failing=frozenset({4, 5}))
    bodies = [*chats(20), chat("new")]
    bodies[9] = chat("changed")
    again = submit(database, tmp_path, bodies, of=first)
    assert (again.total, again.taken) == (21, 17)
    assert [seqs for seqs, _ in cuts_of(database, again.batch_id)] == [[4, 5, 9, 20]]
    assert_counters_equal_rows(database, again.batch_id)
    assert [result.response for result in results_of(database, again.batch_id)] == [
        f'{{"answer":{seq}}}' for seq in range(20) if seq not in {4, 5, 9}
    ]
    with database.transaction() as session:
        progress = batch_progress(session, again.batch_id, tenant="local")
        sources = session.execute(
            text("SELECT DISTINCT source, prompt_tokens FROM results WHERE batch_id = :id"), {"id": again.batch_id}
        ).all()
    assert (progress.done, progress.completion_tokens, progress.options["reused"]) == (17, 0, 17)
    assert [tuple(row) for row in sources] == [("reused", 0)]
    run_all(database)
    assert batch_row(database, again.batch_id)["state"] == "completed"
    assert_counters_equal_rows(database, again.batch_id)


def test_a_batch_of_which_everything_is_reused_is_ended_by_the_normal_closer(
    database: Database, tmp_path: Path
) -> None:
    first = store_batch(database, tmp_path, chats(20))
    run_all(database)
    again = submit(database, tmp_path, chats(20), of=first)
    row = batch_row(database, again.batch_id)
    assert (row["state"], row["shards_left"], again.taken) == ("finalizing", 0, 20)
    assert [shard.done for shard in shards_of(database, again.batch_id)] == [20]
    run_all(database)
    assert batch_row(database, again.batch_id)["state"] == "completed"
    assert_counters_equal_rows(database, again.batch_id)


def test_a_truncated_answer_and_another_custom_id_are_not_reused(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(3))
    [shard_id] = dispatch_all(database)
    with database.transaction() as session:
        truncated = answers([0], outcome=Outcome.TRUNCATED)
        write_results(session, claimed(database, shard_id), truncated, engine_id=None, lease_s=LEASE_S)
    again = submit(database, tmp_path, list(reversed(chats(3))), of=first)
    assert again.taken == 0
    assert [seqs for seqs, _ in cuts_of(database, again.batch_id)] == [[0, 1, 2]]


def test_reuse_of_another_endpoints_batch_is_refused_before_anything_is_stored(
    database: Database, tmp_path: Path
) -> None:
    first = store_batch(database, tmp_path, chats(2))
    with pytest.raises(BadInput, match="same endpoint"):
        submit(database, tmp_path, [{"model": "m", "input": "x"}], of=first, url="/v1/embeddings")
    with database.transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM batches")) == 1


def test_a_batch_that_runs_may_be_reused_and_its_shards_close_meanwhile(database: Database, tmp_path: Path) -> None:
    first = store_batch(database, tmp_path, chats(6), shard_jobs=3)
    done, running = (claimed(database, shard_id) for shard_id in dispatch_all(database))
    with database.transaction() as session:
        write_results(session, done, answers(done.seqs), engine_id=None, lease_s=LEASE_S)
        write_results(session, running, answers([3]), engine_id=None, lease_s=LEASE_S)
    new = store_batch(database, tmp_path, chats(6))
    execute(database, "UPDATE batches SET state = 'validating' WHERE id = :id", id=new)
    with database.transaction() as reusing:
        assert take_results(reusing, first, batch_id=new) == 4
        with database.transaction() as session:
            session.execute(text("SET LOCAL lock_timeout = '2s'"))
            assert close(session, done)
