"""The spans of a batch that came over HTTP, up to where its shards begin; or to its end, when its file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest
from starlette.testclient import TestClient

from models.names import batch_hex
from runtime.settings import Settings, TraceSettings
from runtime.tracing import root_of, start_tracing, stop_tracing
from tests.support.otlp_receiver import OtlpReceiver, receiving_spans


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with receiving_spans() as running:
        start_tracing(Settings.model_construct(trace=TraceSettings(to="otlp", url=running.url)), process="gateway")
        yield running
        stop_tracing()


@pytest.mark.parametrize("is_good", [True, False])
def test_creation_and_validation_stand_under_the_batch(
    client: TestClient, validate: Callable[[], int], receiver: OtlpReceiver, is_good: bool
) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "secret"}]} if is_good else {}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", json.dumps(line))}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=asked).json()["id"]
    assert validate() == 1
    stop_tracing()

    batch_id = UUID(batch_hex(batch))
    assert {span.trace_id for span in receiver.spans} == {batch_id.hex}
    (submit,), (checked,) = receiver.named("submit"), receiver.named("validate")
    assert submit.kind == "server"
    assert submit.parent_id == checked.parent_id == f"{root_of(batch_id).span_id:016x}"
    ends = [(one.error, one.attributes["stoker.state"], one.span_id) for one in receiver.named("batch")]
    assert ends == ([] if is_good else [("failed", "failed", submit.parent_id)])
    assert "secret" not in str(receiver.spans)
