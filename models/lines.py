"""One line of a batch file: what is checked before it is stored, and what of its body may be changed.

Checked is only what would break a batch or an engine; every field that is not named here goes to the
endpoint untouched, and a body that needs no change keeps its bytes. It must not read files or know rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from pydantic import BaseModel, ConfigDict, Field

from models.line_problems import (
    CUSTOM_ID_CHARACTERS,
    LINE_REFUSALS,
    explain_body,
    explain_line,
    explain_url,
    settings_problem,
)
from models.line_settings import LineSettings
from models.states import CacheMode, Trust
from runtime.errors import BadInput, Problem

BYTES_PER_TOKEN = 4  # English text in byte-pair vocabularies; JSON's own characters make it a high estimate

Name = Annotated[str, Meta(min_length=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)] | None
Tokens = Annotated[int, Meta(ge=1)] | UnsetType | None
Texts = str | Annotated[list[Any], Meta(min_length=1)]


class SubmitOptions(BaseModel):
    """What a submit changes in every line.

    `sets` replaces fields of the body whether present or not, `model` the model; `max_output_tokens` is the
    most that one completion may generate: a larger wish, or none, becomes this. `settings` are fields of a line's own
    `stoker` for the lines that do not state them. `validate_answers`: each is held to the JSON schema of its request.
    `trust`: where their prompts may go.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sets: dict[str, Any] = Field(default_factory=dict)
    model: str | None = Field(None, min_length=1)
    max_output_tokens: int = Field(ge=1)
    cache: CacheMode = CacheMode.EXACT
    settings: dict[str, Any] = Field(default_factory=dict)
    validate_answers: bool = False
    trust: Trust = Trust.OWN


@dataclass(frozen=True)
class LineRules:
    """What every line of one file is held to: the options, and the most bytes that a line may have.

    `sampled`: requests that sample may share an answer too.
    """

    options: SubmitOptions
    line_bytes: int
    sampled: bool = False

    @cached_property
    def cache(self) -> CacheMode:
        """The mode of a line that states none."""
        return self.options.cache

    @cached_property
    def most_tokens(self) -> int:
        """The most that one completion may generate."""
        return self.options.max_output_tokens

    @cached_property
    def settings(self) -> LineSettings | None:
        """What holds for lines that do not state it."""
        return msgspec.convert(self.options.settings, LineSettings) if self.options.settings else None

    @cached_property
    def replaced(self) -> dict[str, Raw]:
        """The fields of the body that the options replace, as JSON."""
        model = {} if self.options.model is None else {"model": self.options.model}
        return {name: _as_raw(value) for name, value in (self.options.sets | model).items()}

    @cached_property
    def limited_start(self) -> bytes:
        """How a body begins that stated no limit of its output tokens."""
        return b'{"max_tokens":%d,' % self.options.max_output_tokens


class ParsedLine(Struct, frozen=True, gc=False):
    """A good line, ready to be stored. A Struct: made once a line, in a tenth of a frozen dataclass's time.

    `prompt_tokens` is an estimate from the body's length; `output_tokens` is the most that all completions
    of the line may generate together. `stoker` is its own settings as JSON; `cache` the mode that holds for it.
    `may_share`: that mode is not off, one answer is asked for, and the engine would give the same one again.
    """

    custom_id: str
    url: str
    model: str
    body: bytes
    prompt_tokens: int
    output_tokens: int
    stoker: bytes | None
    cache: CacheMode
    may_share: bool


class _Line(Struct, gc=False):
    custom_id: Annotated[str, Meta(min_length=1, max_length=CUSTOM_ID_CHARACTERS)]
    method: Literal["POST"]
    url: str
    body: Raw
    stoker: LineSettings | None = None


class _Message(Struct, gc=False):
    role: Name


class _Sampled(Struct, gc=False, kw_only=True):
    """What chat and plain completions have in common."""

    model: Name
    stream: Literal[False] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    priority: Literal[0] | None = None
    max_tokens: Tokens = UNSET
    seed: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    functions: Raw | UnsetType = UNSET


class ChatBody(_Sampled, gc=False, kw_only=True):
    """The checked part of a /v1/chat/completions body."""

    messages: Annotated[list[_Message], Meta(min_length=1)]
    max_completion_tokens: Tokens = UNSET
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class ConversationBody(ChatBody, gc=False, kw_only=True):
    """The checked part of the body of a line with turns: what was said before them, if anything."""

    messages: list[_Message] = []


class CompletionBody(_Sampled, gc=False, kw_only=True):
    """The checked part of a /v1/completions body; a prompt may be texts or token ids."""

    prompt: Texts


class EmbeddingsBody(Struct, gc=False, kw_only=True):
    """The checked part of a /v1/embeddings body."""

    model: Name
    input: Texts
    stream: Literal[False] | None = None


_decode_line = msgspec.json.Decoder(_Line).decode
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_decode_conversation = msgspec.json.Decoder(ConversationBody).decode
_decode_body: Mapping[str, Callable[[bytes], Any]] = {
    "/v1/chat/completions": msgspec.json.Decoder(ChatBody).decode,
    "/v1/completions": msgspec.json.Decoder(CompletionBody).decode,
    "/v1/embeddings": msgspec.json.Decoder(EmbeddingsBody).decode,
}
ENDPOINTS = tuple(_decode_body)
_OFF = CacheMode.OFF  # an enum's member is slow to look up, and this is asked of every line
_NOTHING = frozenset({b"null", b"[]", b"{}", b'""', b"false", b"0"})


def parse_line(raw: bytes, number: int, *, rules: LineRules, endpoint: str | None) -> ParsedLine | Problem:
    """The line as it is stored, or the first thing wrong with it; raises nothing, whatever the bytes.

    `raw` is one line of the file, with or without its newline, cut after `rules.line_bytes` + 1 bytes at the
    latest; `number` counts from 1; `endpoint`, one of ENDPOINTS, is the batch's once a line has stated it.
    """
    try:
        line = _decode_line(raw)
        if not raw.isascii():
            raw.decode()  # msgspec does not look into the strings that it skips
        if "\0" in line.custom_id or (len(raw) > rules.line_bytes and len(raw.rstrip(b"\r\n")) > rules.line_bytes):
            return explain_line(raw, number, line_bytes=rules.line_bytes)
    except LINE_REFUSALS:
        return explain_line(raw, number, line_bytes=rules.line_bytes)
    if line.url != endpoint and (endpoint is not None or line.url not in _decode_body):
        return explain_url(line.url, number, endpoint=endpoint, endpoints=ENDPOINTS)
    if rules.settings is not None:
        line.stoker = _completed(line.stoker or LineSettings(), rules.settings)
    if line.stoker is not None and (problem := settings_problem(line.stoker, line.url, number)):
        return problem
    try:
        body = bytes(line.body)
        if rules.replaced:
            body = _replace(body, rules.replaced)
        return _checked(line, body, rules)
    except LINE_REFUSALS as error:
        return explain_body(body, number, error=error, replaced=rules.replaced)


def _completed(stated: LineSettings, common: LineSettings) -> LineSettings:
    """A line's settings with what its batch states for all: a template where there are variables, no passages in steps
    of a recipe."""
    fields = msgspec.structs.asdict(stated)
    for name, value in msgspec.structs.asdict(common).items():
        if fields[name] is not None or (name == "template" and stated.variables is None):
            continue
        if stated.recipe is None or name not in ("collection", "top_k", "context_tokens"):
            fields[name] = value
    return LineSettings(**fields)


def parse_sets(pairs: Sequence[str]) -> dict[str, Any]:
    """`["temperature=0", "user=me"]` as fields of a body: each value is JSON if it can be read so, else text.

    Raises BadInput naming a pair without a name or `=`, or with bytes that are no text.
    """
    sets: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise BadInput(f"--set {pair}: write --set NAME=VALUE, such as --set temperature=0")
        if not _is_text(pair):
            raise BadInput(f"--set {pair!a}: is no valid UTF-8; write it as text")
        try:
            sets[name] = msgspec.json.decode(value)
        except LINE_REFUSALS:
            sets[name] = value
    return sets


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: a command line keeps other bytes as lone surrogates."""
    return value.isascii() or value.encode(errors="ignore").decode() == value


def _checked(line: _Line, body: bytes, rules: LineRules) -> ParsedLine:
    """Raises msgspec's errors when the body breaks the rules of its endpoint."""
    is_conversation = line.stoker is not None and line.stoker.turns is not None
    fields = _decode_conversation(body) if is_conversation else _decode_body[line.url](body)
    if "\0" in fields.model:
        raise msgspec.ValidationError("Holds NUL - at `$.model`")
    cache = rules.cache
    output_tokens, may_share = 0, cache is not _OFF
    kind = type(fields)
    if kind is not EmbeddingsBody:
        wish = fields.max_tokens
        if (
            type(wish) is int
            and wish <= rules.most_tokens
            and kind is ChatBody
            and fields.max_completion_tokens is UNSET
        ):
            output_tokens = wish  # most lines of most files
        else:
            body, output_tokens = _limited(body, fields, rules)
        if isinstance(fields, CompletionBody):
            output_tokens *= _prompts_in(fields.prompt)
        output_tokens *= fields.n or 1
        if fields.temperature == 0 and fields.tools is UNSET and fields.functions is UNSET:
            may_share = may_share and (fields.n is None or fields.n == 1)  # the usual case of _has_one_answer
        else:
            may_share = may_share and _has_one_answer(fields, sampled=rules.sampled)
    if line.stoker is None:
        size = len(body) // BYTES_PER_TOKEN
        return ParsedLine(line.custom_id, line.url, fields.model, body, size, output_tokens, None, cache, may_share)
    return _with_settings(line, fields, body, output_tokens, rules)


def _with_settings(line: _Line, fields: Any, body: bytes, output_tokens: int, rules: LineRules) -> ParsedLine:
    """A line that states some of its own."""
    cache = rules.cache if line.stoker is None or line.stoker.cache is None else line.stoker.cache
    settings = line.stoker or LineSettings()
    shares = cache is not _OFF and not settings.stands_alone
    return ParsedLine(
        line.custom_id,
        line.url,
        fields.model,
        body,
        len(body) // BYTES_PER_TOKEN + sum(map(len, settings.turns or ())) // BYTES_PER_TOKEN,
        output_tokens * len(settings.turns or "1"),
        msgspec.json.encode(line.stoker),
        cache,
        shares and (type(fields) is EmbeddingsBody or _has_one_answer(fields, sampled=rules.sampled)),
    )


def _has_one_answer(fields: _Sampled, *, sampled: bool) -> bool:
    """Whether the engine would give the same single answer again: cache/keys.py's rules, in what is cheap to read.

    They agree but for an empty value of `tools` or `functions` with a space in it, which counts as one here.
    """
    if fields.temperature != 0 and not sampled and (fields.seed is UNSET or bytes(fields.seed) == b"null"):
        return False
    return (fields.n or 1) == 1 and not (_is_given(fields.tools) or _is_given(fields.functions))


def _is_given(value: Raw | UnsetType) -> bool:
    return value is not UNSET and bytes(value) not in _NOTHING


def _limited(body: bytes, fields: _Sampled, rules: LineRules) -> tuple[bytes, int]:
    """The body within the limit of output tokens, and how many one completion may now have.

    Where a chat states both limits the newer one rules, as in the API; the other is held to ours as well,
    because not every server reads them in that order.
    """
    if isinstance(fields, ChatBody) and type(fields.max_completion_tokens) is int:
        body, tokens = _clamp(body, "max_completion_tokens", fields.max_completion_tokens, rules)
        if type(fields.max_tokens) is int:
            body, _ = _clamp(body, "max_tokens", fields.max_tokens, rules)
        return body, tokens
    return _clamp(body, "max_tokens", fields.max_tokens, rules)


def _clamp(body: bytes, name: str, wish: int | UnsetType | None, rules: LineRules) -> tuple[bytes, int]:
    most = rules.most_tokens
    if wish is UNSET:
        return rules.limited_start + body[1:], most
    if type(wish) is int and wish <= most:
        return body, wish
    return _replace(body, {name: _as_raw(most)}), most


def _replace(body: bytes, replaced: Mapping[str, Raw]) -> bytes:
    """The body with these fields set; all others keep their bytes and order."""
    return msgspec.json.encode(_FIELDS.decode(body) | dict(replaced))


def _prompts_in(prompt: str | list[Any]) -> int:
    """How many prompts a completion's `prompt` holds: a list of token ids is one."""
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


def _as_raw(value: object) -> Raw:
    return Raw(msgspec.json.encode(value))
