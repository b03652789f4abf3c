"""One line of a batch file: what is checked before it is stored, and what of its body may be changed.

Checked is only what would break a batch or an engine; every field that is not named here goes to the
endpoint untouched, and a body that needs no change keeps its bytes. It must not read files or know rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from pydantic import BaseModel, ConfigDict, Field

from models.line_problems import explain, explain_length
from runtime.errors import BadInput, Problem

BYTES_PER_TOKEN = 4  # English text in byte-pair vocabularies; JSON's own characters make it a high estimate

Name = Annotated[str, Meta(min_length=1)]
Tokens = Annotated[int, Meta(ge=1)] | None | UnsetType
Penalty = Annotated[float, Meta(ge=-2, le=2)] | None


class SubmitOptions(BaseModel):
    """What a submit changes in every line.

    `sets` overrides fields of the body whether present or not, `model` the model; `max_output_tokens` is
    the most that one completion of a job may generate: larger or missing wishes are set to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sets: dict[str, Any] = Field(default_factory=dict)
    model: str | None = Field(None, min_length=1)
    max_output_tokens: int = Field(ge=1)


@dataclass(frozen=True)
class LineRules:
    """What every line of one file is held to."""

    options: SubmitOptions
    line_bytes: int
    served_models: frozenset[str] | None = field(default=None)

    @cached_property
    def replaced(self) -> dict[str, Raw]:
        """The body fields that the options replace, as JSON."""
        model = {} if self.options.model is None else {"model": self.options.model}
        return {name: Raw(msgspec.json.encode(value)) for name, value in (self.options.sets | model).items()}

    @cached_property
    def clamped_start(self) -> bytes:
        """How a body begins that stated no limit for its output tokens."""
        return b'{"max_tokens":%d,' % self.options.max_output_tokens


class ParsedLine(Struct, frozen=True, gc=False):
    """A good line, ready to be stored; a Struct, made in a tenth of a frozen dataclass's time.

    `prompt_tokens` is an estimate from the body's bytes; `output_tokens` is what its completions may
    generate together.
    """

    custom_id: str
    url: str
    model: str
    body: bytes
    prompt_tokens: int
    output_tokens: int


class _Line(Struct, gc=False):
    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: Raw


class _Message(Struct, gc=False):
    role: Name


class _Sampled(Struct, gc=False, kw_only=True):
    """What chat and plain completions have in common."""

    model: Name
    stream: Literal[False] | None = None  # msgspec has no Literal[False]; see _is_streamed
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    max_tokens: Tokens = UNSET
