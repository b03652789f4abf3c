"""What one worker child records of its shards, and the ids on what it logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from pipeline.traced import trace_end
from runtime.settings import Settings, TraceSettings
from runtime.tracing import root_of, start_tracing, stop_tracing
from store.batches import batches_to_finish, finish
from store.database import Database
from tests.support.batches import execute, rows
from tests.support.conversing import Child, ShownEndpoint, answer, store_lines, talk
from tests.support.otlp_receiver import OtlpReceiver, receiving_spans


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with receiving_spans() as running:
        start_tracing(Settings.model_construct(trace=TraceSettings(to="otlp", url=running.url)), process="test")
        yield running
        stop_tracing()


def test_requests_of_a_conversation_stand_under_their_job_and_the_job_under_its_shard(
    database: Database, tmp_path: Path, receiver: OtlpReceiver
) -> None:
    with ShownEndpoint(lambda number, _: answer(f"reply {number}")) as endpoint:
        plain = {"body": {"model": "scripted", "messages": [{"role": "user", "content": "alone"}]}}
        batch_id = store_lines(database, tmp_path, [talk("one", "two"), plain])
        Child(database, endpoint.url).feed()
    trace_end(database, batch_id)  # it has not ended, and has no span of its own yet
    with database.transaction() as session:
        assert batch_id in batches_to_finish(session) and finish(session, batch_id) == 0
    trace_end(database, batch_id)
    stop_tracing()

    (shard,), (job,) = receiver.named("shard"), receiver.named("job")
    assert shard.links == [f"{root_of(batch_id).span_id:016x}"] and shard.parent_id == "" and shard.error is None
    assert shard.attributes["stoker.jobs"] == 2 and shard.attributes["stoker.fence"] == 1
    assert (job.parent_id, job.attributes["stoker.job.seq"]) == (shard.span_id, 0)
    requests = receiver.named("chat scripted")
    assert {(one.parent_id, one.attributes["stoker.job.seq"]) for one in requests} == {
        (job.span_id, 0),
        (shard.span_id, 1),
    }
    assert sorted(one.attributes["stoker.job.step"][:6] for one in requests if one.parent_id == job.span_id) == [
        "turn-1",
        "turn-2",
    ]
    kept = rows(
        database, "SELECT sum(prompt_tokens), sum(completion_tokens) FROM results WHERE batch_id = :id", id=batch_id
    )
    told = [sum(one.attributes[f"gen_ai.usage.{kind}_tokens"] for one in requests) for kind in ("input", "output")]
    assert kept == [tuple(told)]
    assert sum(one.attributes["stoker.results"] for one in receiver.named("write")) == 2
    assert {one.name for one in receiver.spans if one.trace_id == batch_id.hex} == {"submit", "batch"}
    (root,) = receiver.named("batch")
    assert (root.trace_id, root.span_id, root.parent_id) == (batch_id.hex, shard.links[0], "")
    assert (root.attributes["stoker.state"], root.attributes["stoker.jobs"]) == ("completed", 2)
    assert [root.attributes[f"gen_ai.usage.{kind}_tokens"] for kind in ("input", "output")] == told


def test_what_is_logged_within_an_attempt_has_its_ids(
    database: Database, tmp_path: Path, receiver: OtlpReceiver
) -> None:
    def lost(number: int, _: dict[str, object]) -> dict[str, object]:
        execute(database, "UPDATE shards SET fence = fence + 1")
        return answer("too late")

    with ShownEndpoint(lost) as endpoint, capture_logs(processors=[merge_contextvars]) as logs:
        batch_id = store_lines(database, tmp_path, [talk("one")])
        Child(database, endpoint.url).feed(heartbeat_s=60.0)
    stop_tracing()
    (shard,) = receiver.named("shard")
    (entry,) = (entry for entry in logs if entry["event"] == "fence_lost")
    assert entry["batch_id"] == str(batch_id) and entry["fence"] == 1
    assert entry["shard_id"] == shard.attributes["stoker.shard.id"] and entry["trace_id"] == shard.trace_id
    assert shard.error is not None and shard.attributes["error.type"] == "lost"
