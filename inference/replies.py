"""What a reply is worth: its outcome, its usage, or the error in it. Decodes only what that needs.

It must not raise for anything that a server may say: whatever comes becomes the job's result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from inference.endpoint import Reply
from models.jobs import JobResult, Usage
from models.states import Outcome

MESSAGE_CHARACTERS = 500
CODE_CHARACTERS = 64
LARGEST_COUNT = 2**31 - 1  # token counts are INTEGER columns
REASONING_PARTS = frozenset({"thinking", "reasoning"})


def result_of(seq: int, path: str, reply: Reply) -> JobResult:
    """The result of the job `seq` that was sent to `path`; failed `invalid_response` for a 2xx of no use.

    A priced endpoint's answer has what it is billed, also one of no use.
    `response` is always JSON that Postgres takes as text: invalid UTF-8 is replaced, escapes stay escapes.
    """
    text = reply.body.decode(errors="replace")
    if not 200 <= reply.status_code < 300:
        return _rejection(seq, reply, text)
    try:
        text, answer = _decode(text, _DECODERS.get(path, _ANY_DECODER))
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        return _invalid(seq, reply, f"{type(error).__name__}: {error}; it began with: {text[:200]}")
    return JobResult(
        seq=seq,
        outcome=answer.outcome(),
        status_code=reply.status_code,
        response=text,
        usage=usage_of(answer.usage),
        duration_ms=reply.duration_ms,
        engine_id=reply.engine_id,
        cost=reply.cost,
    )


def usage_of(raw: msgspec.Raw) -> Usage:
    """The counts; zeros where they are missing or absurd, for a good answer is not lost over its bill."""
    try:
        counts = _COUNTS_DECODER.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return Usage()
    cached = counts.prompt_tokens_details
    reasoning = counts.completion_tokens_details
    return Usage(
        prompt_tokens=_count(counts.prompt_tokens),
        completion_tokens=_count(counts.completion_tokens),
        cached_tokens=_count(cached.cached_tokens) if cached else 0,
        reasoning_tokens=_count(reasoning.reasoning_tokens) if reasoning else 0,
    )


def usage_sum(usages: Sequence[Usage]) -> Usage:
    """What several answers took together, as far as a column can count."""
    return Usage(
        *(
            min(sum(getattr(usage, count) for usage in usages), LARGEST_COUNT)
            for count in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
        )
    )


@dataclass(frozen=True, slots=True)
class Said:
    """What the first choice of an answer says: without lone surrogates, so it may go into another request.

    `calls_tools`: it asks for a tool to be called.
    """

    text: str = ""
    finish_reason: str = ""
    calls_tools: bool = False


def said(path: str, response: str) -> Said:
    """The first choice of a response that `result_of` took for an answer."""
    _, answer = _decode(response, _DECODERS[path])
    choices = answer.choices if isinstance(answer, _Chat | _Completion) else []
    return choices[0].said() if choices else Said()


class _Answer(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"{}")

    def outcome(self) -> Outcome:
        """Of an answer whose form is not known here, such as /v1/responses: it came, so it succeeded."""
        return Outcome.SUCCEEDED


class _Part(msgspec.Struct):
    type: str | None = None
    text: str | None = None

    def is_empty(self) -> bool:
        return self.type in REASONING_PARTS or _is_blank(self.text)


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: dict[str, msgspec.Raw] | None = None
    audio: dict[str, msgspec.Raw] | None = None

    @property
    def calls_tools(self) -> bool:
        return bool(self.tool_calls or self.function_call)

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content if part.type in (None, "text"))
        return self.content or self.refusal or ""

    def is_empty(self) -> bool:
        if self.calls_tools or self.audio or self.refusal:
            return False
        if isinstance(self.content, list):
            return all(part.is_empty() for part in self.content)
        return _is_blank(self.content)


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None

    def is_empty(self) -> bool:
        return self.message.is_empty()

    def said(self) -> Said:
        return Said(self.message.text(), self.finish_reason or "", self.message.calls_tools)


class _TextChoice(msgspec.Struct):
    text: str | None
    finish_reason: str | None = None

    def is_empty(self) -> bool:
        return _is_blank(self.text)

    def said(self) -> Said:
        return Said(self.text or "", self.finish_reason or "")


class _Chat(_Answer, kw_only=True):
    choices: list[_Choice]

    def outcome(self) -> Outcome:
        return _outcome_of(self.choices)


class _Completion(_Answer, kw_only=True):
    choices: list[_TextChoice]

    def outcome(self) -> Outcome:
        return _outcome_of(self.choices)


class _Embeddings(_Answer, kw_only=True):
    data: list[msgspec.Raw]

    def outcome(self) -> Outcome:
        return Outcome.SUCCEEDED if self.data else Outcome.EMPTY


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


_DECODERS: dict[str, msgspec.json.Decoder[_Answer]] = {
    "/v1/chat/completions": msgspec.json.Decoder[_Answer](_Chat),
    "/v1/completions": msgspec.json.Decoder[_Answer](_Completion),
    "/v1/embeddings": msgspec.json.Decoder[_Answer](_Embeddings),
}
_ANY_DECODER: msgspec.json.Decoder[_Answer] = msgspec.json.Decoder(_Answer)
_COUNTS_DECODER = msgspec.json.Decoder(_Counts, strict=False)  # some servers count in floats


def _decode(text: str, decoder: msgspec.json.Decoder[_Answer]) -> tuple[str, _Answer]:
    """The answer and its JSON, which is `text` unless only Python's json can read that."""
    try:
        return text, decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        text, whole = _read(text)
        # A question mark for what UTF-8 cannot hold: enough to judge by; the text kept has the escapes.
        return text, decoder.decode(json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace"))


def _read(text: str) -> tuple[str, Any]:
    """The JSON and what it says; rewritten only where msgspec refuses what Python's json takes.

    Escaped lone surrogates, which servers send when a token limit cuts an emoji, stay; NaN becomes null.
    Raises ValueError or RecursionError if it is no JSON.
    """
    answer = json.loads(text, parse_constant=lambda _: None)
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        text = json.dumps(answer)
    return text, answer


def _outcome_of(choices: Sequence[_Choice | _TextChoice]) -> Outcome:
    if any(choice.finish_reason == "length" for choice in choices):
        return Outcome.TRUNCATED
    return Outcome.EMPTY if all(choice.is_empty() for choice in choices) else Outcome.SUCCEEDED


def _is_blank(text: str | None) -> bool:
    return not text or text.isspace()


def _count(tokens: int | None) -> int:
    return min(max(tokens or 0, 0), LARGEST_COUNT)


def _invalid(seq: int, reply: Reply, reason: str) -> JobResult:
    return JobResult(
        seq=seq,
        outcome=Outcome.FAILED,
        status_code=reply.status_code,
        error_code="invalid_response",
        error_message=_short(f"{reply.status_code} without the expected JSON: {reason}"),
        duration_ms=reply.duration_ms,
        engine_id=reply.engine_id,
        cost=reply.cost,
    )


def _rejection(seq: int, reply: Reply, text: str) -> JobResult:
    """A job that the endpoint refused. Rare, so plain `json` reads the many forms that errors have."""
    try:
        response, answer = _read(text)
    except (ValueError, RecursionError):
        message = _short(text) or f"HTTP {reply.status_code}"
        response, answer = _read(json.dumps({"error": {"message": message}}))
    code, message = _error_in(answer)
    return JobResult(
        seq=seq,
        outcome=Outcome.FAILED,
        status_code=reply.status_code,
        response=response,
        error_code=code or f"http_{reply.status_code}",
        error_message=_short(message) or f"HTTP {reply.status_code}",
        duration_ms=reply.duration_ms,
        engine_id=reply.engine_id,
        cost=reply.cost,
    )


def _error_in(answer: Any) -> tuple[str | None, str]:
    """(code, message) of an error as OpenAI, vLLM (old and new), TGI and FastAPI write it."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if not isinstance(error, dict):
        return None, error if isinstance(error, str) else json.dumps(error)
    words = (error.get("code"), error.get("type"))
    code = next((word for word in words if isinstance(word, str) and word.strip()), None)
    message = error.get("message") or error.get("detail") or error
    text = message if isinstance(message, str) else json.dumps(message)
    return code and _short(code)[:CODE_CHARACTERS], text


def _short(text: str) -> str:
    """One line that any text column takes: no NUL, no lone surrogate."""
    line = " ".join(text[: 4 * MESSAGE_CHARACTERS].replace("\0", " ").split())[:MESSAGE_CHARACTERS]
    return line.encode("utf-8", "replace").decode()
