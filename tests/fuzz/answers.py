"""Targets of what servers say, and of what is read of requests on their way: replies, streams, heads, the cache."""

from __future__ import annotations

import asyncio
import json
import math
import unicodedata
from contextlib import suppress
from functools import cache
from typing import Any, Final, cast

from api.shortened import CHARACTERS, Shortener
from api.streamed import events_of
from cache.answers import Kind, answer_text, comparable, comparison
from cache.guards import normalised, signature
from cache.keys import Scope, asks_for_one, essential, exact_key, is_deterministic, namespace_key, read_body
from cache.payload import LONGEST_BARE, SharedAffixes, declared, prompt_of, slots_of, split
from inference.bodies import addressed, estimated_tokens, model_of
from inference.connections import HEAD_LIMIT_BYTES, Answer, _Connection
from inference.embeddings import pack
from inference.endpoint import Reply
from inference.rate_headers import rates_seen, retry_after_s
from inference.refusals import is_about_quota, is_about_the_key
from inference.replies import LARGEST_COUNT, MESSAGE_CHARACTERS, result_of, said, usage_sum
from inference.spoken import MOST_BYTES, answers_json, messages_json
from inference.streams import BrokenStream, is_stream, whole
from models.jobs import Job, JobResult
from models.lines import ENDPOINTS
from models.states import Outcome
from runtime.errors import BadInput, Permanent
from tests.fuzz.target import Target, check_text, pieces_of, strict

CHAT, TEXT, EMBEDDINGS = ENDPOINTS
SHARD_JOBS: Final = 64
STATUSES: Final = (200, 200, 200, 400, 401, 403, 429, 500)


def reply(data: bytes) -> None:
    """Whatever a server says becomes a result that can be stored, shown, compared and passed on."""
    path, status, body = ENDPOINTS[data[0] % 3], STATUSES[data[0] // 3 % 8], data[1:]
    found = result_of(5, path, Reply(status, body, 12))
    _check_result(found, path)
    is_about_quota(status, body)
    is_about_the_key(status, body)
    Shortener().read(found.response)
    if found.response is not None:
        comparison(found.response)
        check_text(answers_json(found.response.encode()), most=MOST_BYTES)
    if found.response is not None and found.outcome is not Outcome.FAILED:
        first = said(path, found.response)
        first.text.encode()
        first.finish_reason.encode()
        with suppress(RecursionError):
            assert answer_text(found.response) in (None, *_texts(found.response))
        if path != EMBEDDINGS:
            _check_events(found.response, with_usage=bool(data[0] & 1))


def _check_result(found: JobResult, path: str) -> None:
    assert found.seq == 5
    for count in (found.usage, usage_sum([found.usage, found.usage])):
        assert 0 <= count.prompt_tokens <= LARGEST_COUNT
        assert 0 <= count.completion_tokens <= LARGEST_COUNT
        assert 0 <= count.cached_tokens <= LARGEST_COUNT
        assert 0 <= count.reasoning_tokens <= LARGEST_COUNT
    if found.outcome is Outcome.FAILED:
        assert found.error_code
        check_text(found.error_code, most=64)
        check_text(found.error_message or "", most=MESSAGE_CHARACTERS)
    if found.response is not None:
        assert "\0" not in found.response
        found.response.encode()
        with suppress(RecursionError):
            strict(found.response)


def _texts(response: str) -> list[Any]:
    """All that an answer's choices say, by another way."""
    choices = strict(response).get("choices", [])
    said_by = [(choice.get("message") or {}).get("content", choice.get("text")) for choice in choices]
    return [*said_by, *(choice.get("text") for choice in choices)]


def _check_events(response: str, *, with_usage: bool) -> None:
    try:
        events = events_of(response, with_usage=with_usage)
    except ValueError:  # the gateway says 502
        return
    *pieces, end, rest = events.encode().split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    for piece in pieces:
        assert strict(piece.removeprefix(b"data: ")).keys()


def stream(data: bytes) -> None:
    """An answer in pieces is whole or broken, and the same with other line ends and with comments between."""
    found = _put_together(data)
    if is_stream(_streamed(data)):
        plain = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        assert found == _put_together(plain) == _put_together(plain.replace(b"\n", b"\r\n"))
        assert found == _put_together(b": hello\n" + plain.replace(b"\n\n", b"\n\n:\nid: 7\nevent: x\n"))
    if found is None:
        return
    assert (found.header("content-type"), is_stream(found)) == ("application/json", False)
    assert 200 <= found.status < 600
    for path in (CHAT, TEXT):
        _check_result(result_of(5, path, Reply(found.status, found.body, 1)), path)
    with suppress(RecursionError):
        assert isinstance(strict(found.body), dict)


def _streamed(body: bytes) -> Answer:
    return Answer(200, [(b"Content-Type", b"text/event-stream")], body)


def _put_together(body: bytes) -> Answer | None:
    try:
        return whole(_streamed(body))
    except BrokenStream:
        return None


class _Transport:
    """Stands where a connection's socket is."""

    def __init__(self) -> None:
        self.is_closed = False

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, content: bytes) -> None:
        del content


BODY_LIMIT_BYTES: Final = 4_096


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def http(data: bytes) -> None:
    """What comes over a connection is one answer, the same in any pieces, or none; its body is within the limit."""
    cuts, content = data[:4], data[4:]
    found = _received([content])
    pieces = _received(list(pieces_of(content, cuts)))
    if len(content) <= HEAD_LIMIT_BYTES:  # of a longer head, what comes in one piece is taken before it is measured
        assert found == pieces
    if found is None:
        return
    assert len(found.body) <= BODY_LIMIT_BYTES
    assert found.status >= 200
    seconds = retry_after_s(found)
    assert seconds is None or (math.isfinite(seconds) and seconds >= 0)
    seen = rates_seen(found)
    for name in seen.__slots__ if seen is not None else ():
        value = getattr(seen, name)
        assert value is None or (math.isfinite(value) and value >= 0), name


def _received(pieces: list[bytes]) -> Answer | None:
    connection = _Connection(_loop(), BODY_LIMIT_BYTES)
    transport = _Transport()
    connection.connection_made(cast(asyncio.Transport, transport))
    answer = connection.ask(b"", b"")
    for piece in pieces:
        if transport.is_closed:
            break
        connection.data_received(piece)
    if not transport.is_closed:
        connection.eof_received()
    connection.connection_lost(None)
    assert answer.done()
    return None if answer.exception() is not None else answer.result()


def body(data: bytes) -> None:
    """What is read of a body, and changed in it, on its way: nothing else of it changes."""
    raw = data[1:]
    model = model_of(raw)
    assert estimated_tokens(raw) > 0
    check_text(messages_json(raw), most=MOST_BYTES)
    try:
        sent = addressed(raw, model="other" if data[0] & 1 else None, streams=bool(data[0] & 2))
    except Permanent as error:
        assert error.code == "invalid_json"
        return
    with suppress(ValueError, RecursionError):
        given, told = strict(raw), strict(sent)
        assert model in (given.get("model"), "")
        ours = ("model", "stream", "stream_options")
        assert {k: v for k, v in told.items() if k not in ours} == {k: v for k, v in given.items() if k not in ours}
        assert told.get("model") == ("other" if data[0] & 1 else given.get("model"))


def vectors(data: bytes) -> None:
    """Embedding jobs are each in one pack, and each has its result of any reply to it."""
    *bodies, answer = data[1:].split(b"\n")
    jobs = [Job(seq, one.decode(errors="replace"), 0) for seq, one in enumerate(bodies[:SHARD_JOBS])]
    packs = pack(jobs, max_tokens=1 + data[0], max_inputs=8)
    assert sorted(job.seq for one in packs for job in one.jobs) == list(range(len(jobs)))
    for one in packs:
        results = one.split(Reply(200, answer, 1, cost=1_000))
        assert [found.seq for found in results] == [job.seq for job in one.jobs]
        if any(found.outcome is not Outcome.FAILED for found in results):
            assert sum(found.cost or 0 for found in results) == 1_000
        for found in results:
            if found.response is not None and len(one.jobs) > 1:
                assert len(strict(found.response)["data"]) == one.input_counts[results.index(found)]


SCOPES: Final = tuple(Scope("t", endpoint, "c", (1,)) for endpoint in ENDPOINTS)


def cached(data: bytes) -> None:
    """Requests that mean the same have one key; what is made one form is so at once."""
    scope, raw = SCOPES[data[0] % 3], data[1:]
    text = raw.decode(errors="replace")
    _check_answer(text)
    _check_payload(text[: 4 * LONGEST_BARE])
    with suppress(ValueError, RecursionError):  # what has no key is not cached
        _check_keys(read_body(raw), scope)


def _check_keys(fields: dict[str, Any], scope: Scope) -> None:
    key = exact_key(fields, scope)
    again = json.loads(json.dumps(dict(reversed(fields.items()))))
    assert exact_key(again, scope) == key
    assert exact_key({**fields, "user": "x", "stream": False}, scope) == key
    assert exact_key({**fields, "unknown": 1, "seed": None}, scope) != exact_key({**fields, "unknown": 2}, scope)
    assert namespace_key(fields, scope, template="a", embedder="e") != key
    assert essential(fields, endpoint=scope.endpoint).keys() <= {*fields, "max_tokens"}
    asks_for_one(fields)
    is_deterministic(fields, endpoint=scope.endpoint)
    found = prompt_of(fields)
    if found is not None:
        _check_payload(found[1])


def _check_answer(text: str) -> None:
    kind, form = comparable(text)
    if kind is not Kind.FREE:
        check_text(form, most=len(text) * 2 + 8)
        assert comparable(f" {text}\n") == comparable(form) == (kind, form)


def _check_payload(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert signature(text) == signature(once)
    assert unicodedata.normalize("NFKC", once) == once
    shared = SharedAffixes()
    lines = text.split("\n")
    for one in lines:
        shared.add(one)
    affixes = shared.affixes()
    for one in lines:
        assert one.startswith(affixes.prefix)
        assert one.endswith(affixes.suffix)
        if (found := split(one, affixes)) is not None:
            assert affixes.prefix + found.payload + affixes.suffix == one
            assert found.payload
    template, *values = lines
    variables = dict(zip(slots_of(template), values, strict=False))
    with suppress(BadInput):
        declared("".join(values), template=template, variables=variables)


def page(data: bytes) -> None:
    """What the page shows of a stored text can be sent, and is bounded, whatever the text is."""
    text = data.decode(errors="replace")
    shortener = Shortener()
    shown = json.dumps(shortener.read(text), ensure_ascii=False, allow_nan=False).encode()
    assert len(shown) <= 8 * CHARACTERS + 8 * len(data)
    if not shortener.has_cut and len(text) < 10_000:
        with suppress(ValueError, RecursionError):
            strict(text)
            assert json.loads(shown) is not None or text.strip() == "null"


_CHAT: Final = {
    **{"id": "c", "object": "chat.completion", "created": 1, "model": "m"},
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop", "logprobs": None},
        {
            "index": 1,
            "message": {"content": None, "tool_calls": [{"id": "t", "function": {"name": "f", "arguments": "{}"}}]},
            "finish_reason": "tool_calls",
        },
    ],
    "usage": {
        **{"prompt_tokens": 3, "completion_tokens": 2.0},
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
}
_PARTS: Final = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "thinking"}]}}]}
_TEXT: Final = {"object": "text_completion", "choices": [{"text": "b", "finish_reason": "length"}]}
_VECTORS: Final = {"data": [{"index": 0, "embedding": "AACAPw=="}, {"index": 1, "embedding": [1.0]}], "model": "m"}
_ERROR: Final = {"error": {"message": "too many", "type": "rate_limit", "code": "insufficient_quota"}}


def _piece(delta: Any, **choice: Any) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, **choice}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


_CALL: Final = {"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f", "arguments": "{"}}]}
_STREAM: Final = (
    _piece({"role": "assistant", "content": ""})
    + _piece({"content": "h\u00e9"})
    + _piece(_CALL)
    + _piece({}, finish_reason="stop")
    + b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\ndata: [DONE]\n\n'
)
_HEADS: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\nx-ratelimit-limit-requests: 60\r\n"
    b"x-ratelimit-remaining-requests: 1\r\nx-ratelimit-reset-requests: 6m0s\r\n\r\n{}",
    b"HTTP/1.1 429 No\r\nTransfer-Encoding: chunked\r\nRetry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n"
    b'RateLimit: "a";r=50;t=30\r\nRateLimit-Policy: "a";q=100;w=60\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 X\r\nretry-after-ms: 20\r\nanthropic-ratelimit-requests-limit: 5\r\n"
    b"anthropic-ratelimit-requests-reset: 2026-01-01T00:00:00Z\r\n\r\nrest",
)
_CHAT_BODY: Final = {
    **{"model": "m", "temperature": 0.0, "seed": 1, "n": 1, "stop": "x", "max_completion_tokens": 5},
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": 'not "a" 12 x7 https://a.b/c'}],
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


TARGETS: Final = {
    "reply": Target(
        "a server's whole answer, or refusal",
        reply,
        (
            b"\0" + _json(_CHAT),
            b"\3" + _json(_PARTS),
            b"\1" + _json(_TEXT),
            b"\2" + _json(_VECTORS),
            b"\x12" + _json(_ERROR),
        ),
    ),
    "stream": Target(
        "a server's answer in pieces",
        stream,
        (
            _STREAM,
            b"data: " + _json(_ERROR) + b"\n\n",
            b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\r\n\r\n',
        ),
        head_bytes=0,
    ),
    "http": Target(
        "HTTP/1.1 as it comes, and its headers on limits",
        http,
        tuple(b"\0\1\7\50" + head for head in _HEADS),
        head_bytes=4,
        is_json=False,
    ),
    "body": Target(
        "a request's body on its way to an endpoint", body, (b"\3" + _json(_CHAT_BODY), b"\0" + _json(_PARTS))
    ),
    "vectors": Target(
        "embedding jobs in one request, and the reply to them",
        vectors,
        (
            b"\x40"
            + b"\n".join((b'{"model":"m","input":"a"}', b'{"model":"m","input":["b"],"encoding_format":"base64"}'))
            + b"\n"
            + _json({**_VECTORS, "usage": {"prompt_tokens": 3}}),
        ),
        s_per_mb=4.0,
    ),
    "cache": Target(
        "requests, prompts and answers as the cache compares them",
        cached,
        (b"\0" + _json(_CHAT_BODY), b"\1" + _json({"prompt": "x"}), b"\0Say {a} to {b}\nSay 1\nSay 2", b"\0-12.50e3"),
        s_per_mb=6.0,
    ),
    "page": Target(
        "stored JSON as the page shows it", page, (_json(_CHAT), b"[[[1e999,NaN,123456789012345678]]]"), head_bytes=0
    ),
}
