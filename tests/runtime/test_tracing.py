"""Spans on their way out: every receiver's address and headers, and that one which is away costs nothing."""

from __future__ import annotations

import base64
import json
import resource
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from runtime import trace_export, trace_file
from runtime.clock import uuid7
from runtime.errors import BadInput
from runtime.settings import Settings, TraceSettings
from runtime.trace_file import attributes_of, read_spans
from runtime.trace_targets import target_of
from runtime.tracing import (
    NOTHING,
    batch_span,
    context_of,
    is_traced,
    own_trace,
    root_of,
    shows_prompts,
    span,
    start_tracing,
    stop_tracing,
)
from tests.support.otlp_receiver import OtlpReceiver, receiving_spans
from tests.support.waiting import wait_until


def traced(**fields: Any) -> Settings:
    home = fields.pop("home", None)
    return Settings.model_construct(home=home, trace=TraceSettings(**fields))


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    stop_tracing()


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with receiving_spans() as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "headers", "resource"),
    [
        ({"to": "otlp"}, {}, {}),
        ({"to": "otlp", "api_key": "k-1"}, {"authorization": "Bearer k-1"}, {}),
        (
            {"to": "langsmith", "api_key": "ls-1", "project": "night runs"},
            {"x-api-key": "ls-1", "langsmith-project": "night runs"},
            {},
        ),
        (
            {"to": "weave", "api_key": "wb-1", "project": "team/batches"},
            {"wandb-api-key": "wb-1"},
            {"wandb.entity": "team", "wandb.project": "batches"},
        ),
        (
            {"to": "langfuse", "api_key": "pk-lf-1:sk-lf-2"},
            {
                "authorization": f"Basic {base64.b64encode(b'pk-lf-1:sk-lf-2').decode()}",
                "x-langfuse-ingestion-version": "4",
            },
            {},
        ),
    ],
)
def test_each_receiver_gets_its_headers_and_the_whole_span(
    receiver: OtlpReceiver, fields: dict[str, Any], headers: dict[str, str], resource: dict[str, str]
) -> None:
    batch_id = uuid7()
    start_tracing(traced(url=receiver.url, **fields), process="test")
    with batch_span("submit", batch_id, attributes={"stoker.jobs": 3, "whole": True, "share": 0.5, "names": ["a"]}):
        pass
    stop_tracing()

    request = receiver.requests[0]
    assert (request.path, request.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
    assert {name: request.headers.get(name) for name in headers} == headers
    one = request.spans[0]
    assert (one.trace_id, one.name, one.kind, one.error) == (batch_id.hex, "submit", "internal", None)
    assert one.parent_id == f"{root_of(batch_id).span_id:016x}"
    assert resource.items() <= one.resource.items() and one.resource["service.name"] == "stoker"
    expected = {"stoker.jobs": 3, "whole": True, "share": 0.5, "names": ["a"], "session.id": f"batch_{batch_id.hex}"}
    assert expected.items() <= one.attributes.items() and one.attributes["whole"] is True
    assert one.attributes.get("wandb.thread_id") == (one.attributes["session.id"] if fields["to"] == "weave" else None)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"to": "otlp"}, "STOKER_TRACE__URL is not set"),
        ({"to": "otlp", "url": "collector:4318"}, "must begin with http"),
        ({"to": "langsmith"}, "STOKER_TRACE__API_KEY is not set; langsmith"),
        ({"to": "langfuse", "api_key": "sk-secret"}, "pk-lf-…:sk-lf-…"),
        ({"to": "weave", "api_key": "k", "project": "alone"}, "entity/project"),
    ],
)
def test_a_missing_setting_is_named_and_no_key_is_said(fields: dict[str, Any], remedy: str) -> None:
    with pytest.raises(BadInput, match=remedy) as refused:
        start_tracing(traced(**fields), process="test")
    assert "secret" not in str(refused.value)


def test_an_address_without_a_path_is_that_of_a_collector() -> None:
    for url in ("http://collector:4318", "http://collector:4318/"):
        assert target_of(TraceSettings(to="otlp", url=url)).url == "http://collector:4318/v1/traces"


def test_a_target_shows_no_key() -> None:
    assert "k-1" not in repr(target_of(TraceSettings(to="otlp", url="http://a", api_key="k-1")))


def test_without_tracing_nothing_is_recorded_and_nothing_imported() -> None:
    start_tracing(traced(to="off"), process="test")
    assert batch_span("submit", uuid7()) is NOTHING and span("job") is NOTHING and not shows_prompts()
    with span("job") as nothing:
        nothing.set({"a": 1})
    assert nothing.header is None and not nothing.is_recorded


def test_a_share_of_batches_is_traced_and_every_process_draws_the_same(tmp_path: Path) -> None:
    start_tracing(traced(to="file", sample=0.25, home=tmp_path), process="test")
    batches = [uuid7() for _ in range(4_000)]
    drawn = [batch_id for batch_id in batches if is_traced(batch_id)]
    assert 800 < len(drawn) < 1_200
    assert drawn == [batch_id for batch_id in batches if is_traced(batch_id)]
    left = next(batch_id for batch_id in batches if not is_traced(batch_id))
    assert batch_span("submit", left) is NOTHING and own_trace("shard", left, attributes={}) is NOTHING
    stop_tracing()
    assert list(read_spans(traced(home=tmp_path), mentioning="traceId")) == []


def test_a_header_carries_the_place_and_a_foreign_one_is_not_followed(receiver: OtlpReceiver) -> None:
    batch_id, other = uuid7(), uuid7()
    start_tracing(traced(to="otlp", url=receiver.url), process="test")
    with batch_span("publish", batch_id, kind="producer") as sent:
        header = sent.header
    with batch_span("process", batch_id, kind="consumer", header=header) as task:
        shard = own_trace("shard", batch_id, attributes={})
        with shard, span("write"):
            pass
    for wrong in (None, "", "00-zz", f"00-{other.hex}-{'1' * 16}-01"):
        with batch_span("process", batch_id, header=wrong):
            pass
    stop_tracing()

    assert header == f"00-{batch_id.hex}-{sent.place.span_id:016x}-01"
    first, *others = receiver.named("process")
    assert first.parent_id == f"{sent.place.span_id:016x}"
    assert {one.parent_id for one in others} == {f"{root_of(batch_id).span_id:016x}"}
    (own,) = receiver.named("shard")
    assert own.trace_id != batch_id.hex and own.parent_id == ""
    assert own.links == [f"{root_of(batch_id).span_id:016x}", f"{task.place.span_id:016x}"]
    (write,) = receiver.named("write")
    assert (write.trace_id, write.parent_id) == (own.trace_id, own.span_id)


def test_work_in_a_context_logs_its_ids_and_the_trace(receiver: OtlpReceiver) -> None:
    batch_id = uuid7()
    start_tracing(traced(to="otlp", url=receiver.url), process="test")
    shard = own_trace("shard", batch_id, attributes={}).begin()
    inside = context_of(shard, batch_id=str(batch_id), shard_id=7).run(structlog.contextvars.get_contextvars)
    assert inside == {"batch_id": str(batch_id), "shard_id": 7, "trace_id": f"{shard.place.trace_id:032x}"}
    assert context_of(NOTHING, shard_id=7).run(structlog.contextvars.get_contextvars) == {"shard_id": 7}
    assert "shard_id" not in structlog.contextvars.get_contextvars()


def test_an_error_names_its_kind_and_not_what_it_says(receiver: OtlpReceiver) -> None:
    start_tracing(traced(to="otlp", url=receiver.url), process="test")
    with pytest.raises(ValueError), batch_span("validate", uuid7()):
        raise ValueError("a prompt of a tenant")
    stop_tracing()
    (failed,) = receiver.named("validate")
    assert failed.error == "ValueError" and failed.attributes["error.type"] == "ValueError"


@pytest.mark.parametrize("trouble", ["hangs", "answers 503", "refuses connections"])
def test_a_receiver_in_trouble_delays_no_work_and_no_end(receiver: OtlpReceiver, trouble: str) -> None:
    receiver.hangs, receiver.status = trouble == "hangs", 503
    url = "http://127.0.0.1:9/v1/traces" if trouble == "refuses connections" else receiver.url
    batch_id = uuid7()
    with capture_logs() as logs:
        start_tracing(traced(to="otlp", url=url), process="test")
        began = time.monotonic()
        for _ in range(trace_export.QUEUED + 2_000):
            batch_span("submit", batch_id).begin().end()
        assert time.monotonic() - began < 10.0, "no span waited"
        began = time.monotonic()
        stop_tracing()
        assert time.monotonic() - began < trace_export.STOP_S + 1.0
        if trouble != "hangs":  # the SDK asks again meanwhile
            wait_until(lambda: len(logs) > 0, trace_export.EXPORT_S + 2.0, "it is said")
    said = [entry["event"] for entry in logs]
    assert said == ["spans_lost"] or (trouble == "hangs" and not said), "once, and without a traceback"


def test_a_receiver_that_returns_gets_what_comes_then_and_each_turn_is_said_once(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_export, "EVERY_MS", 20)
    receiver.status = 404
    with capture_logs() as logs:
        start_tracing(traced(to="otlp", url=f"{receiver.url}?of=us"), process="test")
        for refused in (1, 2):
            batch_span("lost", uuid7()).begin().end()
            wait_until(lambda most=refused: receiver.refused >= most, 5.0, "it was refused")  # type: ignore[misc]
        receiver.status = 200
        batch_span("taken", uuid7()).begin().end()
        wait_until(lambda: len(receiver.named("taken")) == 1, 5.0, "what came then is taken")
        wait_until(lambda: len(logs) == 2, 2.0, "the end is said")
    assert [entry["event"] for entry in logs] == ["spans_lost", "spans_taken_again"]


def test_what_a_receiver_refuses_for_good_is_not_sent_again(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_export, "EVERY_MS", 20)
    receiver.status = 401
    with capture_logs() as logs:
        start_tracing(traced(to="otlp", url=receiver.url, api_key="k-secret"), process="test")
        batch_span("first", uuid7()).begin().end()
        wait_until(lambda: receiver.refused == 1, 5.0, "it was refused")
        receiver.status = 200
        batch_span("second", uuid7()).begin().end()
        wait_until(lambda: receiver.spans, 5.0, "another is taken")
    assert [one.name for one in receiver.spans] == ["second"]
    assert "STOKER_TRACE__API_KEY" in logs[0]["reason"] and "k-secret" not in str(logs)


def test_the_file_is_for_its_owner_only_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "FILE_BYTES", 4_000)
    settings, batch_id = traced(to="file", home=tmp_path), uuid7()
    for number in range(30):
        start_tracing(settings, process="test")
        batch_span("submit", batch_id, attributes={"number": number}).begin().end()
        stop_tracing()
    files = sorted((tmp_path / "traces").glob("spans*"))
    assert len(files) == len(trace_file.NAMES)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert sum(file.stat().st_size for file in files) <= 4 * 4_000
    numbers = [int(str(attributes_of(one)["number"])) for one in read_spans(settings, mentioning=batch_id.hex)]
    assert numbers == list(range(numbers[0], 30)) and numbers[0] > 0
    line = json.loads(files[0].read_text().splitlines()[0])
    assert set(line) == {"resourceSpans"}, "as OpenTelemetry's file receiver reads it"


def test_a_line_that_the_disk_did_not_take_whole_harms_no_other(tmp_path: Path) -> None:
    def line(number: int) -> bytes:
        return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [{"n": number, "p": "-" * 600}]}]}]}).encode()

    trace_file.append(tmp_path / "traces", line(1))
    file, soft_and_hard = tmp_path / "traces" / trace_file.NAMES[0], resource.getrlimit(resource.RLIMIT_FSIZE)
    size_bytes = file.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes + 100, soft_and_hard[1]))
    try:
        with pytest.raises(OSError, match="full"):
            trace_file.append(tmp_path / "traces", line(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
    assert file.stat().st_size == size_bytes
    trace_file.append(tmp_path / "traces", line(3))
    assert [one["n"] for one in read_spans(traced(home=tmp_path), mentioning="spans")] == [1, 3]
