"""A real look at registered endpoints: does one answer, to our names, with usage; what does it say of its limits.

Each alias costs one request of one token. Keys go into headers only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from inference.endpoint import Endpoint, Reply
from inference.replies import result_of
from models.endpoints import EndpointSpec, RatesSeen
from pipeline.endpoints import KeyedEndpoint, key_of
from runtime.errors import BadInput, Permanent, StokerError

TIMEOUT_S: Final = 60.0
EXCERPT_CHARACTERS: Final = 200
LEAST_THINKING_TOKENS: Final = 16  # models that take max_completion_tokens think first, and refuse fewer


@dataclass(frozen=True, slots=True)
class AliasLook:
    """One request of one token: `fault` is empty where it was answered.

    `usage` is whether the answer says how many tokens it took, without which its cost is not known.
    """

    alias: str
    theirs: str
    fault: str = ""
    answer_ms: int | None = None
    usage: bool = False
    seen: RatesSeen | None = None


@dataclass(frozen=True, slots=True)
class EndpointLook:
    """What was found of one endpoint. `listed` are its own names of models; None where it lists none."""

    spec: EndpointSpec
    fault: str = ""
    is_unreachable: bool = False
    connect_ms: int | None = None
    listed: list[str] | None = None
    aliases: list[AliasLook] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What is wrong, nothing where jobs can go there."""
        first = [self.fault] if self.fault else []
        return first + [f"{look.alias}: {look.fault}" for look in self.aliases if look.fault]

    @property
    def is_well(self) -> bool:
        """Whether every alias was answered."""
        return not self.faults

    @property
    def seen(self) -> RatesSeen | None:
        """What its headers say of its limits."""
        return next((look.seen for look in self.aliases if look.seen is not None), None)


def look_at(specs: Sequence[EndpointSpec]) -> list[EndpointLook]:
    """What each endpoint says now to a request for each of its aliases, in their order; all at once."""
    return asyncio.run(_all((spec, tuple(spec.models)) for spec in specs))


def reach(specs: Sequence[EndpointSpec]) -> list[EndpointLook]:
    """Whether each endpoint can be reached now; nothing is asked that costs anything."""
    return asyncio.run(_all((spec, ()) for spec in specs))


async def _all(asked: Iterable[tuple[EndpointSpec, Sequence[str]]]) -> list[EndpointLook]:
    return await asyncio.gather(*(_one(spec, aliases) for spec, aliases in asked))


async def _one(spec: EndpointSpec, aliases: Sequence[str]) -> EndpointLook:
    try:
        endpoint = KeyedEndpoint(spec, key_of(spec)).connect(timeout_s=TIMEOUT_S, connections=4)
    except BadInput as error:
        return EndpointLook(spec, fault=str(error))
    async with endpoint:
        began = time.monotonic()
        listed: list[str] | None = None
        try:
            listed = await endpoint.served_models()
        except Permanent:
            pass  # some providers list none
        except StokerError as error:
            return EndpointLook(spec, fault=str(error), is_unreachable=True)
        connect_ms = _since(began)
        looks = await asyncio.gather(*(_ask(endpoint, spec, alias) for alias in aliases))
    return EndpointLook(spec, connect_ms=connect_ms, listed=listed, aliases=looks)


async def _ask(endpoint: Endpoint, spec: EndpointSpec, alias: str) -> AliasLook:
    theirs = spec.models[alias]
    began = time.monotonic()
    try:
        reply = await _reply(endpoint, spec, theirs)
    except StokerError as error:
        seen = getattr(error, "seen", None)
        return AliasLook(alias, theirs, fault=str(error), seen=seen)
    answer_ms = _since(began)
    result = result_of(0, _path(spec), reply)
    if result.error_code is not None:
        fault = f"answered {reply.status_code}: {_excerpt(reply.body)}"
        return AliasLook(alias, theirs, fault=fault, answer_ms=answer_ms, seen=reply.seen)
    return AliasLook(alias, theirs, answer_ms=answer_ms, usage=result.usage.prompt_tokens > 0, seen=reply.seen)


async def _reply(endpoint: Endpoint, spec: EndpointSpec, theirs: str) -> Reply:
    """The answer to one token's worth; newer models take another name for their limit."""
    post = partial(endpoint.post, _path(spec), request_id="stoker-check")
    if spec.serves == "embeddings":
        return await post(msgspec.json.encode({"model": theirs, "input": "Hi"}))
    asked = {"model": theirs, "messages": [{"role": "user", "content": "Hi"}]}
    reply = await post(msgspec.json.encode({**asked, "max_tokens": 1}))
    if reply.status_code == 400 and b"max_completion_tokens" in reply.body:
        reply = await post(msgspec.json.encode({**asked, "max_completion_tokens": LEAST_THINKING_TOKENS}))
    return reply


def _path(spec: EndpointSpec) -> str:
    return "/v1/embeddings" if spec.serves == "embeddings" else "/v1/chat/completions"


def _excerpt(body: bytes) -> str:
    text = body[: 4 * EXCERPT_CHARACTERS].decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:EXCERPT_CHARACTERS]


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
