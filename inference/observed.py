"""What is seen of one request to an endpoint: its span, by the conventions for generative models, and its metrics.

It changes nothing of a request, and reads a body or an answer only where its span is recorded.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import msgspec

from inference.endpoint import EndpointDown, Reply, Throttled
from inference.replies import usage_of
from inference.routes import Route
from inference.spoken import answers_json, messages_json
from runtime.metrics import COST, REQUEST_SECONDS, REQUESTS, REQUESTS_RUNNING
from runtime.tracing import Span, Value, shows_prompts, span

_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
}
_PROVIDERS: Final = {  # the conventions' names
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "api.mistral.ai": "mistral_ai",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "x_ai",
    "api.cohere.com": "cohere",
    "api.perplexity.ai": "perplexity",
    "generativelanguage.googleapis.com": "gcp.gemini",
}
_REQUEST_ID: Final = re.compile(r"batch_req_[0-9a-f]{32}_(\d{1,9})(?:_(.+))?")
_NANOS: Final = 1e-9


class Sending:
    """One request on its way: `with Sending(…) as sending: reply = sending.answered(await …)`."""

    __slots__ = ("_began", "_outcome", "_path", "_route", "_span")

    def __init__(self, route: Route, path: str, body: bytes, *, request_id: str) -> None:
        self._route, self._path = route, path
        self._outcome: str | None = None
        self._began = 0.0
        self._span = _span_of(route, path, body, request_id)

    def __enter__(self) -> Self:
        REQUESTS_RUNNING.add(1, endpoint=self._route.name)
        self._began = time.monotonic()
        self._span.__enter__()
        return self

    def answered(self, reply: Reply) -> Reply:
        """It was answered so; the answer itself."""
        self._outcome = "ok" if reply.status_code < 400 else "failed"
        if self._span.is_recorded:
            _describe(self._span, self._path, reply)
        return reply

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._span.__exit__(kind, error, trace)
        name = self._route.name
        REQUESTS_RUNNING.add(-1, endpoint=name)
        outcome = self._outcome or _outcome_of(error)
        if outcome is not None:
            REQUESTS.add(1, endpoint=name, outcome=outcome)
            REQUEST_SECONDS.observe(time.monotonic() - self._began, endpoint=name)


def billed(route: Route, nanos: int) -> None:
    """What an endpoint that bills tokens asked for a request."""
    if nanos:
        COST.add(nanos * _NANOS, endpoint=route.name)


def _outcome_of(error: BaseException | None) -> str | None:
    """None: it was abandoned, by the end of its attempt say, which tells nothing of the endpoint."""
    if isinstance(error, Throttled):
        return "throttled"
    if isinstance(error, EndpointDown):
        return "down"
    return "failed" if isinstance(error, Exception) else None


class _Asked(msgspec.Struct):
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice] = []
    usage: msgspec.Raw = msgspec.Raw(b"{}")


_ASKED: Final = msgspec.json.Decoder(_Asked)
_ANSWER: Final = msgspec.json.Decoder(_Answer)


def _span_of(route: Route, path: str, body: bytes, request_id: str) -> Span:
    """The request's span, under what its job is done in; nothing where that is not traced."""
    found = span("", kind="client")
    if not found.is_recorded:
        return found
    try:
        asked = _ASKED.decode(body)
    except (ValueError, RecursionError):  # the endpoint judges it; msgspec's errors are ValueErrors
        asked = _Asked()
    operation = _OPERATIONS.get(path, path.rsplit("/", 1)[-1])
    found.name = f"{operation} {asked.model}" if asked.model else operation
    host, port = _server(route.endpoint.url)
    known: dict[str, Value | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDERS.get(host, route.name),
        "gen_ai.request.model": asked.model,
        "gen_ai.request.max_tokens": asked.max_completion_tokens or asked.max_tokens or asked.max_output_tokens,
        "gen_ai.request.temperature": asked.temperature,
        "gen_ai.request.top_p": asked.top_p,
        "gen_ai.request.seed": asked.seed,
        "server.address": host,
        "server.port": port,
        "stoker.endpoint": route.name,
        "stoker.request.id": request_id,
    }
    if (named := _REQUEST_ID.fullmatch(request_id)) is not None:
        known |= {"stoker.job.seq": int(named[1]), "stoker.job.step": named[2]}
    if shows_prompts() and (said := messages_json(body)):
        known |= {"gen_ai.input.messages": said, "gen_ai.prompt": said}
    found.set({name: value for name, value in known.items() if value is not None})
    return found


def _describe(found: Span, path: str, reply: Reply) -> None:
    """What an answer says of itself."""
    if reply.status_code >= 400:
        found.fail(str(reply.status_code), f"the endpoint refused it with {reply.status_code}")
        return
    try:
        answer = _ANSWER.decode(reply.body)
    except (ValueError, RecursionError):
        return
    usage = usage_of(answer.usage)
    known: dict[str, Any] = {
        "gen_ai.response.id": answer.id,
        "gen_ai.response.model": answer.model,
        "gen_ai.response.finish_reasons": [one.finish_reason for one in answer.choices if one.finish_reason] or None,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": None if path == "/v1/embeddings" else usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens or None,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
    }
    if shows_prompts() and (said := answers_json(reply.body)):
        known |= {"gen_ai.output.messages": said, "gen_ai.completion": said}
    found.set({name: value for name, value in known.items() if value is not None})


@lru_cache(maxsize=256)
def _server(url: str) -> tuple[str, int | None]:
    """Host and port that a URL names; of a socket its path."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path, None
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
