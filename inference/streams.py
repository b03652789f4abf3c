"""A stream of pieces (server-sent events) put together to the answer that would have come in one.

Pure functions of bytes. What the pieces hold beside the fields that are known here is kept as the last piece has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from inference.connections import Answer

# Of a message: text that comes in pieces. All else (role, a call's id and name) comes whole, and the last one counts.
_GROWING: Final = frozenset({"refusal", "reasoning_content", "reasoning", "arguments", "data", "transcript"})
_LISTS_BY_INDEX: Final = frozenset({"tool_calls"})
_OWN_FIELDS: Final = frozenset({"choices", "usage", "error"})  # of a piece: all other are the answer's
_OBJECTS: Final = {"chat.completion.chunk": "chat.completion"}
_STATUS: Final = re.compile(r"([45]\d\d)(?:\.0)?", re.ASCII)  # some servers write it as text, or as a float
_STATUS_OF_TYPES: Final = {
    "rate_limit": 429,
    "insufficient_quota": 429,
    "invalid_request": 400,
    "badrequest": 400,
    "authentication": 401,
    "permission": 403,
    "not_found": 404,
    "overloaded": 503,
}


class BrokenStream(ValueError):
    """It ended before the answer did, or is none; how much of it was computed is not known."""


def is_stream(answer: Answer) -> bool:
    """Whether the answer is one of pieces, and not the whole that a server sends that does not stream."""
    if not 200 <= answer.status < 300:
        return False
    kind = answer.header("content-type") or ""
    return "event-stream" in kind or (not kind and answer.body.lstrip().startswith(b"data:"))


def whole(answer: Answer) -> Answer:
    """The answer without its pieces: a JSON body, as without `stream`; or the error in a piece, with its status.

    Raises BrokenStream unless it has an end: `[DONE]`, or a finish_reason in every choice. An error that comes after
    some of the answer, and is not of the request, is one too.
    """
    try:
        return _whole(answer, _read(answer.body))
    except (AttributeError, TypeError, RecursionError) as error:  # a list where an object belongs, and the like
        raise BrokenStream(f"the stream's pieces have no form that is known: {error}") from error


def _whole(answer: Answer, stream: _Stream) -> Answer:
    if stream.error:
        return _failed(answer, stream)
    if not stream.choices:
        raise BrokenStream("the stream ended without an answer")
    if not stream.is_done and not all(choice.is_finished for choice in stream.choices.values()):
        raise BrokenStream("the stream ended before the answer did: no [DONE], and no finish_reason")
    body = {**stream.head, "choices": [stream.choices[index].whole(index) for index in sorted(stream.choices)]}
    if stream.usage is not None:
        body["usage"] = stream.usage
    return _replaced(answer, answer.status, _encoded(body))


def _events(body: bytes) -> Iterator[bytes]:
    """What each event says, in turn (WHATWG HTML, section 9.2.6); comments and other fields are dropped."""
    if b"\r" in body:  # JSON escapes it, so that a bare one ends a line
        body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines: list[bytes] = []
    for line in body.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif not line and lines:
            yield b"\n".join(lines)
            lines = []
    if lines:
        yield b"\n".join(lines)


def _read(body: bytes) -> _Stream:
    stream = _Stream()
    for data in _events(body):
        if data.strip() == b"[DONE]":
            stream.is_done = True
            break
        piece = _decoded(data)
        stream.error = piece if piece.get("object") == "error" else piece.get("error")  # the former: an older vLLM
        if stream.error:
            break
        for name, value in piece.items():
            if name not in stream.head and name not in _OWN_FIELDS and value is not None:
                stream.head[name] = _OBJECTS.get(value, value) if name == "object" else value
        stream.usage = piece.get("usage") or stream.usage
        for part in piece.get("choices") or ():
            index = part.get("index") or 0
            if index not in stream.choices:
                stream.choices[index] = _Choice()
            stream.choices[index].grow(part)
    return stream


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        piece = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        try:  # half of an emoji is a lone surrogate, which msgspec refuses; its other half follows
            piece = json.loads(data.decode(errors="replace"), parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise BrokenStream(f"a piece of the stream is no JSON: {data[:100]!r}") from error
    if not isinstance(piece, dict):
        raise BrokenStream(f"a piece of the stream is no JSON object: {data[:100]!r}")
    return piece


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (UnicodeEncodeError, msgspec.MsgspecError):
        return json.dumps(body).encode()  # two halves of an emoji, escaped one after the other, are one


class _Choice:
    """One of the answers, as far as its pieces have come; most bring a few letters of its text and nothing else."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}
        self._texts: list[str] = []

    def grow(self, part: dict[str, Any]) -> None:
        """Add what one piece has of it."""
        fields = self._fields
        for name, value in part.items():
            if name == "index":
                continue
            if name == "delta":
                self._grow_message(value or {})
            elif name == "text" and isinstance(value, str):
                self._texts.append(value)
            elif value is None:
                fields.setdefault(name, None)
            else:
                _merge(fields, {name: value})

    def _grow_message(self, delta: dict[str, Any]) -> None:
        message = self._fields.get("message")
        if message is None:
            message = self._fields["message"] = {}
        for name, value in delta.items():
            if name == "content" and isinstance(value, str):
                self._texts.append(value)
            else:
                _merge(message, {name: value})

    @property
    def is_finished(self) -> bool:
        return bool(self._fields.get("finish_reason"))

    @property
    def has_begun(self) -> bool:
        message = self._fields.get("message") or {}
        return any(self._texts) or any(message.get(name) for name in (*_GROWING, *_LISTS_BY_INDEX))

    def whole(self, index: int) -> dict[str, Any]:
        """The choice as an answer that comes in one has it."""
        message = self._fields.pop("message", None)
        rest = self._fields
        text = "".join(self._texts)
        if message is None:
            return {"index": index, "text": text, **rest}
        for name in _LISTS_BY_INDEX:
            if isinstance(message.get(name), dict):
                message[name] = [call for _, call in sorted(message[name].items())]
        role, parts = message.pop("role", "assistant"), message.pop("content", None)
        is_null = not text and (not self._texts or message.get("tool_calls"))  # pieces begin with "" where it is null
        content = parts or (None if is_null else text)  # some servers send lists of parts instead of text
        return {"index": index, "message": {"role": role, "content": content, **message}, **rest}


@dataclass(slots=True)
class _Stream:
    """All that the pieces have brought."""

    head: dict[str, Any] = field(default_factory=dict)
    choices: dict[int, _Choice] = field(default_factory=dict)
    usage: Any = None
    error: Any = None
    is_done: bool = False


def _merge(target: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        known = target.get(name)
        if value is None or value == []:
            target.setdefault(name, value)
        elif name in _LISTS_BY_INDEX and isinstance(value, list):
            _merge_by_index(target, name, value)
        elif isinstance(value, dict) and isinstance(known, dict | None):
            target[name] = known = known or {}
            _merge(known, value)
        elif isinstance(value, list) and isinstance(known, list):
            known.extend(value)
        elif isinstance(value, str) and isinstance(known, str):
            target[name] = known + value if name in _GROWING else value or known
        else:
            target[name] = value


def _merge_by_index(target: dict[str, Any], name: str, parts: list[Any]) -> None:
    calls = target.get(name)
    if not isinstance(calls, dict):
        calls = target[name] = {}
    for position, part in enumerate(parts):
        index = part.get("index")
        index = position if index is None else index
        _merge(calls.setdefault(index, {}), {key: value for key, value in part.items() if key != "index"})


def _failed(answer: Answer, stream: _Stream) -> Answer:
    """The error as an answer with its own status; raises BrokenStream where part of the answer was computed."""
    status = _status_of(stream.error)
    body = _encoded({"error": stream.error})
    if status >= 500 and any(choice.has_begun for choice in stream.choices.values()):
        raise BrokenStream(f"the server ended its answer with an error: {body.decode(errors='replace')}")
    return _replaced(answer, status, body)


def _status_of(error: Any) -> int:
    """What the error calls itself, as a status; 500 where it does not say."""
    if not isinstance(error, dict):
        return 500
    words = [error.get(name) for name in ("status", "status_code", "code", "type")]
    for word in words:
        if found := _STATUS.fullmatch(str(word)):
            return int(found[1])
    said = " ".join(word.lower() for word in words if isinstance(word, str))
    return next((status for kind, status in _STATUS_OF_TYPES.items() if kind in said), 500)


def _replaced(answer: Answer, status: int, body: bytes) -> Answer:
    headers = [(name, value) for name, value in answer.headers if name.lower() != b"content-type"]
    return Answer(status, [*headers, (b"content-type", b"application/json")], body)
