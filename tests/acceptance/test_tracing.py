"""A batch's trace across real processes: command, dispatcher, broker, worker; and a receiver that goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from models.names import batch_hex
from runtime.tracing import root_of
from tests.acceptance.chats import chat, prompts, results_in, write_chats
from tests.support.otlp_receiver import OtlpReceiver, receiving_spans
from tests.support.processes import WorkerProcess, stoker
from tests.support.waiting import wait_until

WAIT_S = 30.0  # of a busy machine; a second or two on a quiet one


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with receiving_spans() as running:
        yield running


@pytest.fixture
def traced(env: dict[str, str], receiver: OtlpReceiver) -> dict[str, str]:
    return env | {"STOKER_TRACE__TO": "otlp", "STOKER_TRACE__URL": receiver.url, "STOKER_TRACE__API_KEY": "k-secret"}


def test_one_trace_leads_from_submit_to_result_and_a_receiver_that_is_away_costs_nothing(
    traced: dict[str, str], receiver: OtlpReceiver, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(
        "".join(chat(f"id-{number}", f"secret question {number}", max_tokens=2 + number % 2) for number in range(40))
    )
    with WorkerProcess("one", env=traced, folder=tmp_path) as worker:
        batch = stoker("submit", tmp_path / "in.jsonl", env=traced).stdout.strip()
        wait_until(lambda: receiver.named("batch") and len(receiver.named("shard")) == 3, WAIT_S, "the spans are there")
        _holds_together(receiver, batch, traced["STOKER_POSTGRES__URL"])

        receiver.hangs = True
        write_chats(tmp_path / "more.jsonl", prompts(40, orders=" again"))
        stoker("submit", tmp_path / "more.jsonl", env=traced)
        wait_until(lambda: results_in(traced["STOKER_POSTGRES__URL"]) == 80, WAIT_S, "every job has its result")
        assert worker.terminate(WAIT_S) == 0
        assert "k-secret" not in worker.log and "Traceback" not in worker.log


def _holds_together(receiver: OtlpReceiver, batch: str, postgres_url: str) -> None:
    """Every span of the batch has its place, by the broker's messages too, and states what the results state."""
    spans = {span.span_id: span for span in receiver.spans}
    assert len(spans) == len(receiver.spans) and {one.attributes["stoker.batch.id"] for one in spans.values()} == {
        batch
    }
    (root,) = receiver.named("batch")
    assert (root.trace_id, root.span_id) == (batch_hex(batch), f"{root_of(_id_of(batch)).span_id:016x}")
    names = {}
    for name, under in (
        ("submit", "batch"),
        ("publish generation", "batch"),
        ("process generation", "publish generation"),
    ):
        names[name] = receiver.named(name)
        assert names[name] and all(spans[one.parent_id].name == under for one in names[name]), name
        assert {one.trace_id for one in names[name]} == {root.trace_id}
    assert {one.kind for one in names["publish generation"]} == {"producer"}
    assert {one.resource["stoker.process"] for one in spans.values()} == {"command", "dispatcher", "worker"}
    shards = receiver.named("shard")
    for shard in shards:
        assert [spans[link].name for link in shard.links] == ["batch", "process generation"]
        inside = [one for one in spans.values() if one.trace_id == shard.trace_id and one is not shard]
        assert {one.parent_id for one in inside} == {shard.span_id}
        assert {"cache lookup", "chat scripted", "write"} == {one.name for one in inside}
    requests = receiver.named("chat scripted")
    with psycopg.connect(postgres_url) as connection:
        rows = connection.execute("SELECT seq, prompt_tokens, completion_tokens FROM results ORDER BY seq").fetchall()
    assert rows == sorted(
        (
            one.attributes["stoker.job.seq"],
            one.attributes["gen_ai.usage.input_tokens"],
            one.attributes["gen_ai.usage.output_tokens"],
        )
        for one in requests
    )
    assert root.attributes["gen_ai.usage.output_tokens"] == sum(row[2] for row in rows) > 0
    assert {tuple(one.attributes["gen_ai.response.finish_reasons"]) for one in requests} == {("length",)}
    assert "secret question" not in str(receiver.spans)
    assert {request.headers["authorization"] for request in receiver.requests} == {"Bearer k-secret"}


def _id_of(batch: str) -> UUID:
    return UUID(batch_hex(batch))
