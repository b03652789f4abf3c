"""Result files: their lines, their order, what stands beside them."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from models.jobs import JobResult, Usage, failed
from models.states import Outcome
from pipeline.export import follow_lines, manifest, write_lines
from store.batches import batch_progress, finish
from store.database import Database
from store.engines import register_engine
from store.shards import Claim, close, write_results
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, store_batch
from tests.support.waiting import wait_until


def one_claim(database: Database, folder: Path, jobs: int) -> tuple[UUID, Claim]:
    batch_id = store_batch(database, folder, chats(jobs))
    [shard_id] = dispatch_all(database)
    return batch_id, claimed(database, shard_id)


def write(database: Database, taken: Claim, results: Sequence[JobResult], *, engine_id: int | None = None) -> None:
    with database.transaction() as session:
        assert write_results(session, taken, results, engine_id=engine_id, lease_s=LEASE_S)


def end(database: Database, taken: Claim) -> None:
    with database.transaction() as session:
        assert close(session, taken)
        assert finish(session, taken.batch_id) == 0


def lines_of(database: Database, batch_id: UUID) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    output, errors = io.BytesIO(), io.BytesIO()
    counts = write_lines(database, batch_id, output=output, errors=errors)
    good, bad = ([json.loads(line) for line in file.getvalue().split(b"\n")[:-1]] for file in (output, errors))
    assert counts == (len(good), len(bad))
    return good, bad


def test_lines_stand_in_input_order_whatever_finished_first(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 6)
    for seqs in ([5, 2], [0], [4, 1]):
        write(database, taken, answers(seqs))
    good, bad = lines_of(database, batch_id)
    assert [line["custom_id"] for line in good] == ["id-0", "id-1", "id-2", "id-4", "id-5"]
    assert bad == []
    assert good[1] == {
        "id": f"batch_req_{batch_id.hex}_1",
        "custom_id": "id-1",
        "error": None,
        "response": {"status_code": 200, "request_id": f"batch_req_{batch_id.hex}_1", "body": {"answer": 1}},
        "stoker": {"outcome": "succeeded", "source": "engine"},
    }


def test_failed_jobs_stand_in_the_error_file(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 5)
    rejected = JobResult(
        seq=3,
        outcome=Outcome.FAILED,
        status_code=400,
        response='{"error":"no"}',
        error_code="http_400",
        error_message="no",
    )
    write(database, taken, [rejected, failed(1, code="timeout", message="15 min"), *answers([0])])
    write(database, taken, [*answers([2], outcome=Outcome.TRUNCATED), *answers([4], outcome=Outcome.EMPTY)])
    good, bad = lines_of(database, batch_id)
    assert [(line["custom_id"], line["stoker"]["outcome"]) for line in good] == [
        ("id-0", "succeeded"),
        ("id-2", "truncated"),
        ("id-4", "empty"),
    ]
    assert [line["custom_id"] for line in bad] == ["id-1", "id-3"]
    assert (bad[0]["response"], bad[0]["error"]) == (None, {"code": "timeout", "message": "15 min"})
    assert bad[1]["response"]["status_code"] == 400
    assert bad[1]["response"]["body"] == {"error": "no"}


def test_a_file_that_is_not_wanted_is_counted_all_the_same(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 2)
    write(database, taken, [*answers([0]), failed(1, code="timeout", message="late")])
    assert write_lines(database, batch_id, output=None, errors=None) == (1, 1)


def test_escapes_that_postgres_and_utf8_refuse_survive_as_they_came(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 3)
    hard = ['{"text":"\\u0000"}', '{"text":"cut \\ud83d"}', '{\n "text":\r\n "two\\nlines \u2028 \U0001f600"}']
    write(
        database,
        taken,
        [
            JobResult(seq=seq, outcome=Outcome.SUCCEEDED, status_code=200, response=response)
            for seq, response in enumerate(hard)
        ],
    )
    good, _ = lines_of(database, batch_id)
    assert [line["response"]["body"]["text"] for line in good] == ["\0", "cut \ud83d", "two\nlines \u2028 \U0001f600"]


def test_following_gives_a_line_as_soon_as_all_before_it_have_finished(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 5)
    seen: list[tuple[Outcome, str]] = []

    def follow() -> None:
        for outcome, line in follow_lines(database, batch_id, tenant="local"):
            seen.append((outcome, json.loads(line)["custom_id"]))

    follower = threading.Thread(target=follow)
    follower.start()
    write(database, taken, answers([0, 1, 3]))
    wait_until(lambda: len(seen) == 2, 10, "the first two lines")
    write(database, taken, [*answers([4])])
    write(database, taken, [failed(2, code="timeout", message="late")])
    wait_until(lambda: len(seen) == 5, 10, "the gap is filled")
    assert follower.is_alive(), "the batch has not ended"
    end(database, taken)
    follower.join(10)
    assert not follower.is_alive()
    assert [custom_id for _, custom_id in seen] == [f"id-{seq}" for seq in range(5)]
    assert seen[2][0] is Outcome.FAILED


def test_following_an_ended_batch_gives_all_its_lines_and_ends(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 3)
    write(database, taken, answers([2, 1, 0]))
    end(database, taken)
    assert len(list(follow_lines(database, batch_id, tenant="local"))) == 3


def test_the_manifest_says_what_made_the_results(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 4)
    described = {"kind": "vllm", "version": "1", "checkpoint_digest": "sha256:00"}
    with database.transaction() as session:
        engine_id = register_engine(session, described)
        assert register_engine(session, dict(reversed(described.items()))) == engine_id
        register_engine(session, {"kind": "llamacpp"})
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, reasoning_tokens=1)
    write(
        database,
        taken,
        [
            JobResult(seq=seq, outcome=outcome, status_code=200, response="{}", usage=usage)
            for seq, outcome in enumerate(Outcome)
        ],
        engine_id=engine_id,
    )
    end(database, taken)
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    said = manifest(database, progress)
    assert json.loads(json.dumps(said)) == said
    assert (said["batch"], said["state"], said["endpoint"]) == (
        f"batch_{batch_id.hex}",
        "completed",
        "/v1/chat/completions",
    )
    assert said["engines"] == [described], "only those that gave results"
    counts = {"total": 4, "done": 4, "succeeded": 1, "failed": 1, "truncated": 1, "empty": 1, "followers": 0}
    assert said["jobs"] == counts
    assert said["tokens"] == {"prompt": 12, "completion": 8, "cached": 4, "reasoning": 4}
    [file] = tmp_path.glob("*.jsonl")
    assert said["input"]["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert said["input"]["file_bytes"] == file.stat().st_size
    assert (said["max_output_tokens"], all(said["times"].values())) == (64, True)


def test_a_line_says_which_endpoint_did_it_and_what_that_asks(database: Database, tmp_path: Path) -> None:
    batch_id, taken = one_claim(database, tmp_path, 3)
    with database.transaction() as session:
        own = register_engine(session, {"kind": "vllm", "checkpoint": "qwen"})
        cloud = register_engine(session, {"kind": "endpoint", "name": "cloud", "currency": "EUR", "trust": "external"})
        free = register_engine(session, {"kind": "endpoint", "name": "next-door", "trust": "own"})
    mine, billed, not_billed = answers(range(3))
    results = [mine, replace(billed, engine_id=cloud, cost=123_000), replace(not_billed, engine_id=free)]
    write(database, taken, results, engine_id=own)
    end(database, taken)
    good, _ = lines_of(database, batch_id)
    assert [line["stoker"] for line in good] == [
        {"outcome": "succeeded", "source": "engine"},
        {
            "outcome": "succeeded",
            "source": "engine",
            "endpoint": "cloud",
            "cost": {"amount": 0.000123, "currency": "EUR"},
        },
        {"outcome": "succeeded", "source": "engine", "endpoint": "next-door"},
    ]
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    took = {"jobs": 1, "tokens_in": 3, "tokens_out": 2, "tokens_in_cached": 0}
    assert manifest(database, progress)["endpoints"] == [
        {"name": "vllm qwen", **took, "cost": None},
        {"name": "cloud", **took, "cost": {"amount": 0.000123, "currency": "EUR"}},
        {"name": "next-door", **took, "cost": None},
    ]
