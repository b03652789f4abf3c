"""Answers in pieces are put together to what a server that does not stream would have said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from inference.connections import SETTLED_S, Answer
from inference.endpoint import Endpoint, EndpointDown, Reply, ServerFault, Stalled, Throttled
from inference.streams import BrokenStream, is_stream, whole
from tests.support.scripted_endpoint import ScriptedEndpoint

T = TypeVar("T")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EVENTS = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
DONE = b"data: [DONE]\n\n"


def stream_of(*pieces: object, end: bytes = DONE) -> Answer:
    events = b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces)
    return Answer(200, EVENTS, events + end)


def piece(delta: dict[str, Any] | None = None, *, index: int = 0, **choice: Any) -> dict[str, Any]:
    part = {"index": index, "delta": delta or {}, "finish_reason": None, **choice}
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "system_fingerprint": "fp"}
    return {**head, "choices": [part], "usage": None}


def said(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(whole(answer).body)
    return found


def test_a_chat_in_pieces_becomes_the_answer_in_one() -> None:
    answer = said(
        stream_of(
            piece({"role": "assistant", "content": ""}, logprobs=None),
            piece({"content": "Hel"}, logprobs={"content": [{"token": "Hel", "logprob": -0.1}], "refusal": None}),
            piece({"content": "lo"}, logprobs={"content": [{"token": "lo", "logprob": -0.2}], "refusal": None}),
            piece(finish_reason="stop", stop_reason=None),
            {"id": "c-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
        )
    )

    logprobs = [{"token": "Hel", "logprob": -0.1}, {"token": "lo", "logprob": -0.2}]
    assert answer == {
        "id": "c-1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "system_fingerprint": "fp",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": {"content": logprobs, "refusal": None},
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }


def test_tool_calls_grow_by_their_index_and_the_content_is_null_beside_them() -> None:
    first = {"index": 0, "id": "call-a", "type": "function", "function": {"name": "add", "arguments": ""}}
    second = {"index": 1, "id": "call-b", "type": "function", "function": {"name": "sub", "arguments": "{}"}}
    answer = said(
        stream_of(
            piece({"role": "assistant", "content": ""}),
            piece({"tool_calls": [first]}),
            piece({"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]}),
            piece({"tool_calls": [second, {"index": 0, "id": "call-a", "function": {"arguments": ": 1}"}}]}),
            piece(finish_reason="tool_calls"),
        )
    )

    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "call-a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "call-b", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
    ]


def test_a_first_piece_without_content_hides_none_of_the_rest() -> None:
    answer = said(
        stream_of(piece({"role": "assistant", "content": None}), piece({"content": "1."}), piece(finish_reason="stop"))
    )

    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "1."}


def test_reasoning_refusals_and_several_choices_are_kept_apart() -> None:
    answer = said(
        stream_of(
            piece({"role": "assistant", "reasoning_content": "hm"}, index=1),
            piece({"role": "assistant", "refusal": "I "}),
            piece({"reasoning_content": "m"}, index=1),
            piece({"refusal": "won't"}),
            piece({"content": "yes"}, index=1),
            piece(finish_reason="stop"),
            piece(finish_reason="length", index=1),
        )
    )

    refusing, thinking = answer["choices"]
    assert refusing["message"] == {"role": "assistant", "content": None, "refusal": "I won't"}
    assert thinking["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hmm"}
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]


def test_text_completions_join_their_texts_and_log_probabilities() -> None:
    def text(part: str, offset: int, finish: str | None = None) -> dict[str, Any]:
        logprobs = {"tokens": [part], "token_logprobs": [-0.5], "text_offset": [offset]}
        choice = {"index": 0, "text": part, "logprobs": logprobs, "finish_reason": finish}
        return {"id": "t", "object": "text_completion", "model": "m", "choices": [choice]}

    choice = said(stream_of(text("one", 0), text(" two", 3, "stop")))["choices"][0]

    assert choice["text"] == "one two"
    assert choice["logprobs"] == {"tokens": ["one", " two"], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 3]}


def test_comments_other_fields_and_carriage_returns_are_no_matter() -> None:
    body = b'\r\n: OPENROUTER PROCESSING\r\n\r\nevent: x\r\nid: 1\r\ndata:{"id":"a","choices":[{"index":0,\r\n'
    body += b'data:"delta":{"content":"hi"},"finish_reason":"stop"}]}\r\n\r\n'

    assert said(Answer(200, EVENTS, body))["choices"][0]["message"]["content"] == "hi"


def test_an_emoji_cut_in_two_pieces_is_one_again() -> None:
    pieces = rb'data: {"choices":[{"delta":{"content":"\ud83d"}}]}' + b"\n\n"
    pieces += rb'data: {"choices":[{"delta":{"content":"\ude00"},"finish_reason":"stop"}]}' + b"\n\n"

    assert said(Answer(200, EVENTS, pieces))["choices"][0]["message"]["content"] == "😀"


@given(st.text(), st.data())
def test_however_a_text_is_cut_it_is_whole_again(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    answer = said(stream_of(*(piece({"content": part}) for part in parts), piece(finish_reason="stop"), end=b""))

    assert answer["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    "answer",
    [
        stream_of(piece({"content": "half"}), end=b""),
        stream_of(piece({"content": "a"}, finish_reason="stop"), piece({"content": "b"}, index=1), end=b""),
        stream_of(),
        stream_of({"choices": [], "usage": {}}),
        stream_of([1]),
        stream_of({"choices": [3]}),
        stream_of({"choices": [{"index": [1], "delta": {}}]}),
        stream_of({"choices": [{"index": "x", "delta": {"tool_calls": [4]}}]}),
        stream_of(piece({"content": "half"}), {"error": {"message": "gone", "code": 502}}),
        Answer(200, EVENTS, b"data: {not json\n\n"),
    ],
)
def test_a_stream_without_an_end_or_a_form_is_no_answer(answer: Answer) -> None:
    with pytest.raises(BrokenStream):
        whole(answer)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"error": {"message": "m", "code": 429}}, 429),
        ({"error": {"message": "m", "code": "503"}}, 503),
        ({"error": {"message": "m", "type": "rate_limit_error", "code": None}}, 429),
        ({"error": {"message": "m", "type": "overloaded_error"}}, 503),
        ({"error": {"message": "m", "type": "BadRequestError"}}, 400),
        ({"object": "error", "message": "m", "code": 400}, 400),
        ({"error": {"message": "m", "code": 404.0}}, 404),
        ({"error": {"message": "m", "code": "9" * 5000}}, 500),
        ({"error": "no more"}, 500),
    ],
)
def test_an_error_in_the_stream_is_the_answer_with_its_status(error: dict[str, Any], status: int) -> None:
    answer = whole(stream_of(piece({"role": "assistant", "content": ""}), error))

    assert answer.status == status
    assert json.loads(answer.body) == {"error": error.get("error", error)}


def test_an_error_with_a_code_beyond_all_numbers_is_one_of_the_server() -> None:
    assert whole(Answer(200, EVENTS, b'data: {"error":{"code":1e999}}\n\n')).status == 500


def test_only_a_success_in_events_is_a_stream() -> None:
    assert is_stream(stream_of())
    assert is_stream(Answer(200, [], b"\ndata: {}"))
    assert not is_stream(Answer(200, [(b"content-type", b"application/json")], b"{}"))
    assert not is_stream(Answer(500, EVENTS, b"data: {}"))


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as running:
        yield running


def ask(
    server: ScriptedEndpoint, prompt: str, *, path: str = CHAT, streams: bool = True, timeout_s: float = 10, **more: Any
) -> Reply:
    asked = {"prompt": prompt} if path == TEXT else {"messages": [{"role": "user", "content": prompt}]}
    body = json.dumps({"model": "scripted", **asked, **more}).encode()

    async def run() -> Reply:
        async with Endpoint(
            server.url,
            api_key=None,
            timeout_s=timeout_s,
            connections=2,
            streams=streams,
            first_byte_s=0.4,
            idle_s=0.3,
        ) as endpoint:
            return await endpoint.post(path, body, request_id="r")

    return uvloop.run(run())


@pytest.mark.parametrize(
    "case",
    [
        {"prompt": "one two three"},
        {"prompt": "[[reasoning]] why", "max_tokens": 5},
        {"prompt": "[[empty]]"},
        {"prompt": "n of them", "n": 3},
        {"prompt": "a text", "path": TEXT},
        {"prompt": " spaces  kept ", "path": TEXT},
    ],
)
def test_a_streamed_answer_is_the_same_as_one_that_is_not(server: ScriptedEndpoint, case: dict[str, Any]) -> None:
    streamed, plain = (json.loads(ask(server, **case, streams=streams).body) for streams in (True, False))

    for choice in plain["choices"]:  # what is null may be left out of a stream
        if "message" in choice:
            choice["message"] = {name: value for name, value in choice["message"].items() if value or name == "content"}
    for choice in streamed["choices"]:
        if "message" in choice and not choice["message"]["content"]:
            choice["message"]["content"] = None
    assert streamed == plain


def test_a_server_that_does_not_stream_all_the_same_is_taken_at_its_word(server: ScriptedEndpoint) -> None:
    assert ask(server, "[[status 404]]").status_code == 404
    assert b"not json" not in ask(server, "[[not json]]").body


def test_silence_before_the_first_byte_or_in_the_middle_is_a_stall(server: ScriptedEndpoint) -> None:
    with pytest.raises(Stalled, match=r"no first byte of an answer within 0\.4 s") as caught:
        ask(server, "[[hang]]")
    assert caught.value.was_sent
    with pytest.raises(Stalled, match=r"no more of the answer within 0\.3 s"):
        ask(server, "[[stall 5]] a b c d")


def test_an_answer_may_take_longer_than_any_silence(server: ScriptedEndpoint) -> None:
    assert b"long" in ask(server, "[[stall 0.2]] [[latency 0.3]] as long as it takes").body


@pytest.mark.parametrize("order", ["[[cut stream]]", "[[error-event 500]]"])
def test_a_stream_that_breaks_may_have_run(server: ScriptedEndpoint, order: str) -> None:
    with pytest.raises(EndpointDown) as caught:
        ask(server, f"{order} some words of the answer")

    assert caught.value.was_sent


def test_an_error_in_the_stream_is_raised_as_its_status_is(server: ScriptedEndpoint) -> None:
    with pytest.raises(Throttled, match="as the script says"):
        ask(server, "[[error-event 429]] some words")
    with pytest.raises(ServerFault):
        ask(server, "[[status 503]]")


@pytest.mark.parametrize("keeps", [True, False])
def test_connections_are_used_again_after_streams_only_where_the_server_keeps_them(*, keeps: bool) -> None:
    body = stream_of(piece({"content": "a"}, finish_reason="stop")).body
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'{"model":')
        writer.write(head + body)
        await asyncio.sleep(0.01)
        while keeps:
            await reader.readuntil(b'{"model":')
            writer.write(head + body)

    async def work(endpoint: Endpoint) -> None:
        for _ in range(3):
            await endpoint.post(CHAT, b'{"model":"m"}', request_id="r")
        await asyncio.sleep(2 * SETTLED_S)
        for _ in range(3):
            await endpoint.post(CHAT, b'{"model":"m"}', request_id="r")

    connections = with_server(answer, work)[1]
    assert connections <= 3 if keeps else connections == 6


@pytest.mark.parametrize("closes", [True, False])
def test_a_stream_that_has_said_its_end_is_whole_though_the_connection_stays_open_or_breaks(*, closes: bool) -> None:
    body = stream_of(piece({"content": "paid for"}, finish_reason="stop")).body
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'{"model":')
        writer.write(head + f"{len(body):x}\r\n".encode() + body + b"\r\n")
        if not closes:
            await reader.read()

    async def work(endpoint: Endpoint) -> Reply:
        return await endpoint.post(CHAT, b'{"model":"m"}', request_id="r")

    assert b"paid for" in with_server(answer, work)[0].body


def with_server(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    work: Callable[[Endpoint], Awaitable[T]],
) -> tuple[T, int]:
    """What `work` returns, and how many connections were made to a server that treats each by `answer`."""
    ends: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()
        await writer.wait_closed()

    async def run() -> T:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            async with Endpoint(url, api_key=None, timeout_s=5, connections=1, streams=True, idle_s=0.1) as endpoint:
                found = await work(endpoint)
            await asyncio.gather(*(end for end in ends if end is not None))
        return found

    return uvloop.run(run()), len(ends)
