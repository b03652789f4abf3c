"""A single request: what the gateway takes in, and what a worker answers. Neither is ever a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from models.jobs import Usage
from models.line_problems import LINE_REFUSALS
from models.lines import LineRules, SubmitOptions, parse_line
from models.states import CacheMode, Trust
from runtime.errors import Problem

ENGINE_DIED: Final = "engine_died"
_OURS: Final = ("stoker", "stream", "stream_options")  # members of a body that no endpoint sees
_LARGEST: Final = 2**62  # the gateway limits a body before it comes here


@dataclass(frozen=True, slots=True)
class SingleRequest:
    """A good request: its `body` is what an endpoint gets, with its output tokens clamped.

    `streams`: its client wants an event stream, `with_usage` one that ends with the usage.
    """

    path: str
    model: str
    body: bytes
    trust: Trust
    streams: bool
    with_usage: bool


class SingleAnswer(Struct, frozen=True, kw_only=True):
    """What became of it: `response` as the endpoint said it, or why there is none.

    `code` and `message` are set where it is not a success; without a `status_code` nothing was answered.
    """

    status_code: int | None = None
    response: str | None = None
    code: str | None = None
    message: str | None = None
    usage: Usage = Usage()
    engine_id: int | None = None
    cost: int | None = None


class _Ours(Struct, forbid_unknown_fields=True):
    trust: Trust = Trust.OWN


class _StreamOptions(Struct):
    include_usage: bool | None = None


def read_single(raw: bytes, path: str, *, max_output_tokens: int) -> SingleRequest | Problem:
    """The request in a body that was sent to `path`, or the first thing wrong with it; raises nothing.

    It is held to what a line of a batch file is held to.
    """
    try:
        fields: dict[str, Any] = dict(_FIELDS.decode(raw))
    except LINE_REFUSALS as error:
        return Problem(None, "invalid_json", None, f"the body is no JSON object: {error}")
    ours = {name: fields.pop(name, _ABSENT) for name in _OURS}
    try:
        trust = (_OWN.decode(ours["stoker"]) or _Ours()).trust
    except LINE_REFUSALS:
        return Problem(None, "invalid_value", "stoker", 'must be {"trust": "own"} or {"trust": "external"}')
    try:
        streams = _FLAG.decode(ours["stream"]) or False
        options = _OPTIONS.decode(ours["stream_options"]) or _StreamOptions()
    except LINE_REFUSALS:
        return Problem(None, "invalid_value", "stream", "must be true or false, and `stream_options` an object")
    line = {"custom_id": "single", "method": "POST", "url": path, "body": fields}
    rules = LineRules(
        SubmitOptions(max_output_tokens=max_output_tokens, cache=CacheMode.OFF), line_bytes=_LARGEST, sampled=False
    )
    parsed = parse_line(msgspec.json.encode(line), 1, rules=rules, endpoint=path)
    if isinstance(parsed, Problem):
        field = None if parsed.field is None else parsed.field.removeprefix("body").removeprefix(".") or None
        message = parsed.message.replace("name a model in the line, or submit with --model NAME", "name a model")
        message = message.replace("--max-output-tokens", "STOKER_LIMITS__MAX_OUTPUT_TOKENS")
        return Problem(None, "invalid_value", field, message)
    return SingleRequest(path, parsed.model, parsed.body, trust, streams, bool(options.include_usage))


_ABSENT: Final = Raw(b"null")
_FIELDS: Final = msgspec.json.Decoder(dict[str, Raw])
_OWN: Final = msgspec.json.Decoder(_Ours | None)
_FLAG: Final = msgspec.json.Decoder(bool | None)
_OPTIONS: Final = msgspec.json.Decoder(_StreamOptions | None)
