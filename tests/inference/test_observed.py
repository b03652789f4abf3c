"""What a request's span states, by the conventions for generative models; a real server, no worker."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest

from inference.endpoint import Endpoint, Reply
from inference.observed import Sending
from inference.router import Router
from inference.routes import Route
from inference.spoken import MOST_BYTES, answers_json, messages_json
from models.names import request_name
from runtime.clock import uuid7
from runtime.errors import StokerError
from runtime.settings import Settings, TraceSettings
from runtime.tracing import own_trace, start_tracing, stop_tracing
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan, receiving_spans
from tests.support.scripted_endpoint import ScriptedEndpoint

CHAT, COMPLETION, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as running:
        yield running


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with receiving_spans() as running:
        yield running
        stop_tracing()


def asked(receiver: OtlpReceiver, url: str, path: str, body: dict[str, Any], **trace: Any) -> tuple[UUID, ReceivedSpan]:
    """Send one request of a shard's attempt: its batch, and the request's span as it came."""
    settings = Settings.model_construct(trace=TraceSettings(to="otlp", url=receiver.url, **trace))
    start_tracing(settings, process="test")
    batch_id = uuid7()

    async def send() -> None:
        async with Endpoint(url, api_key=None, timeout_s=5.0, connections=1) as endpoint:
            with own_trace("shard", batch_id, attributes={}):
                router = Router(engine=Route(endpoint, places=1))
                await router.post(path, json.dumps(body).encode(), request_id=f"{request_name(batch_id, 5)}_turn-2")

    with suppress(StokerError):
        asyncio.run(send())
    stop_tracing()
    (found,) = (span for span in receiver.spans if span.name != "shard")
    return batch_id, found


def nested(deep: int, fields: str = "") -> bytes:
    """A body with these fields, in one of which objects are nested so deep."""
    inner = '{"a":' * deep + "1" + "}" * deep
    return (
        f'{{{fields}"messages": [{{"content": {inner}}}], "choices": [{{"message": {{"content": {inner}}}}}]}}'.encode()
    )


def chat(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": prompt}], **fields}


def test_a_chat_states_model_parameters_tokens_and_place(receiver: OtlpReceiver, server: ScriptedEndpoint) -> None:
    body = chat("what is two and two", max_tokens=9, temperature=0.5, top_p=0.9, seed=7)
    batch_id, span = asked(receiver, server.url, CHAT, body)
    assert (span.name, span.kind, span.error) == ("chat scripted", "client", None)
    told = {name: value for name, value in span.attributes.items() if name != "gen_ai.response.id"}
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "engine",
        "gen_ai.request.model": "scripted",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.response.model": "scripted",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 6,
        "server.address": "127.0.0.1",
        "server.port": int(server.url.rsplit(":", 1)[1].split("/")[0]),
        "stoker.batch.id": f"batch_{batch_id.hex}",
        "session.id": f"batch_{batch_id.hex}",
        "stoker.endpoint": "engine",
        "stoker.job.seq": 5,
        "stoker.job.step": "turn-2",
        "stoker.request.id": f"batch_req_{batch_id.hex}_5_turn-2",
    }
    (shard,) = receiver.named("shard")
    assert (span.trace_id, span.parent_id) == (shard.trace_id, shard.span_id)


def test_prompts_and_answers_are_there_only_when_asked_for(receiver: OtlpReceiver, server: ScriptedEndpoint) -> None:
    _, span = asked(receiver, server.url, CHAT, chat("tell nobody"))
    assert "tell nobody" not in str(span)
    receiver.requests.clear()
    _, span = asked(receiver, server.url, CHAT, chat("tell nobody"), prompts=True)
    assert json.loads(span.attributes["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "tell nobody"}]}
    ]
    assert json.loads(span.attributes["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "echo: tell nobody"}], "finish_reason": "stop"}
    ]


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        (COMPLETION, {"model": "scripted", "prompt": "once", "max_tokens": 4}, "text_completion scripted"),
        (EMBEDDINGS, {"model": "scripted", "input": ["a", "b"]}, "embeddings scripted"),
    ],
)
def test_other_operations_have_their_names(
    receiver: OtlpReceiver, server: ScriptedEndpoint, path: str, body: dict[str, Any], name: str
) -> None:
    _, span = asked(receiver, server.url, path, body)
    assert span.name == name and span.attributes["gen_ai.operation.name"] == name.removesuffix(" scripted")
    assert ("gen_ai.usage.output_tokens" in span.attributes) is (path == COMPLETION)


@pytest.mark.parametrize(
    ("order", "kind"), [("[[status 503]]", "ServerFault"), ("[[status 429]]", "Throttled"), ("[[status 400]]", "400")]
)
def test_an_error_is_named_and_says_nothing_of_the_answer(
    receiver: OtlpReceiver, server: ScriptedEndpoint, order: str, kind: str
) -> None:
    _, span = asked(receiver, server.url, CHAT, chat(f"secret words {order}"))
    assert span.attributes["error.type"] == kind and span.error
    assert "secret words" not in str(span)


def test_what_cannot_be_read_is_still_a_span(receiver: OtlpReceiver, server: ScriptedEndpoint) -> None:
    _, span = asked(receiver, server.url, CHAT, chat("[[not json]]"), prompts=True)
    assert span.name == "chat scripted" and span.error is None and "gen_ai.output.messages" not in span.attributes


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "é" * 100_000}] * 3},
        {"messages": [{"role": "user", "content": f"turn {number}"} for number in range(5_000)]},
        {"prompt": ["x" * 5_000] * 100},
        {"input": [[1, 2, 3]] * 4_000},
        {"messages": [{"role": "user", "content": [1] * 10_000}] * 1_000},  # none of them long: 8 s of CPU once
    ],
)
def test_long_prompts_are_cut_and_stay_json(body: dict[str, Any]) -> None:
    text = messages_json(json.dumps(body).encode())
    assert 0 < len(text.encode()) <= MOST_BYTES
    assert json.loads(text)[0]["role"] == "user"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"choices": 1}',
        b'{"messages": [1, null, {"content": 5}]}',
        b'{"choices": [null, {"message": 3}]}',
        b'{"messages": [{"content": [{"type": "image_url"}, {"text": "\\ud800"}]}]}',
        b'{"messages": [{"tool_calls": [null, {"function": {}}]}]}',
        b'{"messages": []}',
        nested(100_000),
    ],
)
def test_no_body_makes_it_raise(body: bytes) -> None:
    for text in (messages_json(body), answers_json(body)):
        text.encode()
        assert not text or json.loads(text)


def test_nesting_that_can_just_be_read_is_left_out_or_told() -> None:
    limit = sys.getrecursionlimit()
    for deep in range(limit - 200, limit):
        body = nested(deep)
        for text in (messages_json(body), answers_json(body)):
            assert not text or "parts" in text


def test_nesting_without_end_costs_no_request(receiver: OtlpReceiver) -> None:
    settings = Settings.model_construct(trace=TraceSettings(to="otlp", url=receiver.url, prompts=True))
    start_tracing(settings, process="test")
    route = Route(Endpoint("http://127.0.0.1:1", api_key=None, timeout_s=5.0, connections=1), places=1)
    body = nested(100_000, '"model": "deep", ')
    with own_trace("shard", uuid7(), attributes={}), Sending(route, CHAT, body, request_id="") as sending:
        reply = Reply(status_code=200, body=nested(100_000, '"usage": {}, '), duration_ms=1)
        assert sending.answered(reply) is reply
    stop_tracing()
    (span,) = (span for span in receiver.spans if span.name != "shard")
    assert span.name == "chat" and span.error is None
