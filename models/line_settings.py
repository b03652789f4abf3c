"""A line's own `stoker` object: how it is to run. It is stored beside the body and never sent to an engine."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from models.states import CacheMode

MOST_TURNS = 1_000
MOST_PASSAGES = 50

Text = Annotated[str, Meta(min_length=1)]


class LineSettings(Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What a line may state; nothing stated is None.

    `template` with its slots filled from `variables` is the text of the request. `sources` names the documents that
    the prompt was made from. `turns` are what the user says after the body's messages, one after each reply;
    `conversation` is the id of an earlier one that they continue. `top_k` passages of `collection`, of at most
    `context_tokens` together, go into the prompt: those that `query`, else its last user message, is about. `recipe`,
    with its `options`, is done to `document`, the id of one that was added. `window_tokens`: the most of one prompt
    with its answer.
    """

    cache: CacheMode | None = None
    template: Text | None = None
    variables: dict[str, str] | None = None
    sources: Annotated[list[Text], Meta(min_length=1)] | None = None
    turns: Annotated[list[Text], Meta(min_length=1, max_length=MOST_TURNS)] | None = None
    conversation: Text | None = None
    window_tokens: Annotated[int, Meta(ge=64)] | None = None
    collection: Text | None = None
    top_k: Annotated[int, Meta(ge=1, le=MOST_PASSAGES)] | None = None
    query: Text | None = None
    context_tokens: Annotated[int, Meta(ge=16)] | None = None
    recipe: Text | None = None
    document: Annotated[int, Meta(ge=1)] | None = None
    options: dict[str, Any] | None = None

    @property
    def has_steps(self) -> bool:
        """Whether it takes several requests, each of which may need the replies before it."""
        return self.turns is not None or self.recipe is not None

    @property
    def stands_alone(self) -> bool:
        """Whether its answer depends on more than its body: no other line's answer may stand for it."""
        return self.has_steps or self.collection is not None


UNREADABLE: Final = msgspec.ValidationError  # of read_settings, where a newer version has stored them

_DECODER = msgspec.json.Decoder(LineSettings)


def read_settings(stoker: str | bytes) -> LineSettings:
    """The settings as they were stored; raises UNREADABLE if this version does not know them."""
    return _DECODER.decode(stoker)


def cache_mode_of(settings: LineSettings, batch: CacheMode) -> CacheMode:
    """Which earlier answers may serve a line: what it states itself, else what its batch does."""
    return settings.cache or batch
