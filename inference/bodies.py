"""What is read of a request's body, and what is changed in it, on its way to an endpoint: nothing that is not needed.

It must not judge a body: the endpoint does.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from models.lines import BYTES_PER_TOKEN
from runtime.errors import Permanent

# Chosen: what an answer takes that states no bound. Guessing low only means that a shared bucket is corrected later.
OUTPUT_TOKENS: Final = 256
# What providers count for an image of high detail is 765 to 1,600; its base64 says nothing of it.
TOKENS_PER_FILE: Final = 1000
_BASE64: Final = b";base64,"
# What msgspec raises. How deep JSON may be depends on the stack: a body that was read once may be too deep elsewhere.
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def model_of(body: bytes) -> str:
    """The body's `model`; "" where there is none, or no JSON."""
    try:
        return _MODEL.decode(body).model
    except _UNREADABLE:
        model = _fields(body).get("model")
        return model if isinstance(model, str) else ""


def addressed(body: bytes, *, model: str | None, streams: bool) -> bytes:
    """The body with this `model`, if one is given, and asking for a stream that ends with the usage, if it `streams`.

    All else stays byte by byte. Raises Permanent `invalid_json` for a body that is no JSON object.
    """
    changes: dict[str, Any] = {}
    if model is not None:
        changes["model"] = model
    if streams:
        changes["stream"] = True
        changes["stream_options"] = {"include_usage": True}
    try:
        fields: dict[str, Any] = dict(_RAW_FIELDS.decode(body))
    except _UNREADABLE:
        fields = _fields(body)  # what Python's json takes and msgspec refuses, such as half of an emoji
        if not fields:
            raise Permanent("the request's body is no JSON object", code="invalid_json") from None
        return json.dumps({**fields, **changes}).encode()
    return _ENCODER.encode({**fields, **changes})


def estimated_tokens(body: bytes) -> int:
    """Tokens that a request takes of a limit a minute: its prompt, guessed by its bytes, and the most that it answers.

    An answer without a stated bound is taken for OUTPUT_TOKENS; embeddings answer none.
    """
    return estimated_prompt_tokens(body) + _output_tokens(body)


def estimated_prompt_tokens(body: bytes) -> int:
    """Tokens of the prompt, guessed by the body's bytes; a file in base64 counts TOKENS_PER_FILE."""
    size_bytes, files = len(body), 0
    if _BASE64 in body:
        start = body.find(_BASE64)
        while start >= 0:
            end = body.find(b'"', start)
            end = end if end >= 0 else len(body)
            size_bytes -= end - start
            files += 1
            start = body.find(_BASE64, end)
    return size_bytes // BYTES_PER_TOKEN + files * TOKENS_PER_FILE + 1


class _Named(msgspec.Struct):
    model: str = ""


class _Bounds(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()


_MODEL: Final = msgspec.json.Decoder(_Named)
_BOUNDS: Final = msgspec.json.Decoder(_Bounds)
_RAW_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_PROMPTS: Final = msgspec.json.Decoder(list[str])
_ENCODER: Final = msgspec.json.Encoder()


def _output_tokens(body: bytes) -> int:
    try:
        bounds = _BOUNDS.decode(body)
    except _UNREADABLE:
        return OUTPUT_TOKENS
    if len(bounds.input) and not len(bounds.messages) and bounds.max_output_tokens is None:
        return 0
    most = bounds.max_completion_tokens or bounds.max_tokens or bounds.max_output_tokens or OUTPUT_TOKENS
    answers = max(bounds.n or 1, bounds.best_of or 1, 1)
    return max(most, 0) * answers * _prompts_in(bounds.prompt)


def _prompts_in(prompt: msgspec.Raw) -> int:
    """How many texts a completion is asked for at once."""
    if bytes(memoryview(prompt)[:1]) != b"[":
        return 1
    try:
        return max(len(_PROMPTS.decode(prompt)), 1)
    except _UNREADABLE:  # token ids: one text, or lists of them, which are rare
        return 1


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
