"""The exact key: two requests with one key would be answered alike by one checkpoint. Pure; it reads no rows.

A field that cannot change an answer is left out, one that is given with its default counts as absent, and numbers
and objects have one form. Everything else, known to us or not, is part of the key; also the order within fields that
an engine may read in order: the properties of a schema are generated in theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

KEY_BYTES: Final = 32
EMBEDDINGS: Final = "/v1/embeddings"

# Who asks, what it is filed under, how it is delivered.
_WITHOUT_EFFECT: Final = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream", "stream_options"}
)
# Objects whose fields have no order; in all others it may be read.
_UNORDERED: Final = frozenset({"messages", "logit_bias"})
_SAMPLED: Final[Mapping[str, Any]] = {
    "n": 1,
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "stop": [],
}
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "/v1/chat/completions": {
        **_SAMPLED,
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "response_format": {"type": "text"},
    },
    "/v1/completions": {**_SAMPLED, "echo": False, "suffix": "", "best_of": 1},
    EMBEDDINGS: {"encoding_format": "float"},
}


@dataclass(frozen=True, slots=True)
class Scope:
    """What an answer belongs to beside its request: nothing crosses any of these."""

    tenant: str
    endpoint: str
    checkpoint: str
    epochs: tuple[int, ...]
    validated: bool = False  # answers are held to their request's schema, so others may not serve


def read_body(body: str | bytes) -> dict[str, Any]:
    """The fields of a stored body. Raises ValueError if it is no JSON object, RecursionError if it is too deep."""
    return msgspec.json.decode(body, type=dict[str, Any])


def exact_key(fields: Mapping[str, Any], scope: Scope, *, passages: Sequence[str] = ()) -> bytes:
    """KEY_BYTES of a request; `passages` are the digests of what retrieval put into it."""
    return _digest([_scope(scope), essential(fields, endpoint=scope.endpoint), list(passages)])


def essential(fields: Mapping[str, Any], *, endpoint: str) -> dict[str, Any]:
    """The fields that can change an answer, without those at their default, in one form."""
    defaults = _DEFAULTS.get(endpoint, {})
    kept = {}
    for name, value in fields.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        plain = _plain(value)
        if name == "stop" and isinstance(plain, str):
            plain = [plain]
        if name not in defaults or plain != defaults[name]:
            kept[name] = plain if name in _UNORDERED else _in_order(plain)
    if "max_completion_tokens" in kept and "max_tokens" not in kept:
        kept["max_tokens"] = kept.pop("max_completion_tokens")
    return kept


def _plain(value: Any) -> Any:
    """With numbers in one form: 1.0 is 1."""
    if isinstance(value, dict):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _in_order(value: Any) -> Any:
    """Objects as lists of their fields, so that these keep their order in the digest."""
    if isinstance(value, dict):
        return {"": [[name, _in_order(member)] for name, member in value.items()]}
    if isinstance(value, list):
        return [_in_order(item) for item in value]
    return value


def is_deterministic(fields: Mapping[str, Any], *, endpoint: str) -> bool:
    """Whether the engine would give the same answer again: temperature 0, a seed, or an embedding."""
    if endpoint == EMBEDDINGS:
        return True
    temperature = fields.get("temperature")
    return (temperature is not None and temperature == 0) or fields.get("seed") is not None


def asks_for_one(fields: Mapping[str, Any]) -> bool:
    """Whether one plain answer is asked for: no tools, no choices to pick from."""
    return (fields.get("n") or 1) == 1 and not fields.get("tools") and not fields.get("functions")


def namespace_key(
    fields: Mapping[str, Any], scope: Scope, *, template: str, embedder: str, passages: Sequence[str] = ()
) -> bytes:
    """KEY_BYTES of all that two payloads must share before one may answer for the other.

    `fields` are the request's without its text, for which `template`, the text with its payload blanked, stands.
    """
    rest = {name: value for name, value in fields.items() if name not in ("messages", "prompt")}
    shape = [essential(rest, endpoint=scope.endpoint), template, embedder, list(passages)]
    return _digest([_scope(scope), "namespace", *shape])


def collection_name(secret: bytes) -> str:
    """What Chroma calls the collection of a namespace: its own also in a server that several installations share."""
    return f"stoker-{hashlib.sha256(secret).hexdigest()[:32]}"


def _scope(scope: Scope) -> list[Any]:
    held = ["validated"] if scope.validated else []
    return [scope.tenant, scope.endpoint, scope.checkpoint, *scope.epochs, *held]


def _digest(value: Any) -> bytes:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).digest()
