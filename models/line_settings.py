"""A line's own `stoker` object: how it is to run. It is stored beside the body and never sent to an engine."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from models.states import CacheMode

Text = Annotated[str, Meta(min_length=1)]


class LineSettings(Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What a line may state; nothing stated is None.

    `template` with its slots filled from `variables` is the text of the request. `sources` names the documents that
    the prompt was made from.
    """

    cache: CacheMode | None = None
    template: Text | None = None
    variables: dict[str, str] | None = None
    sources: Annotated[list[Text], Meta(min_length=1)] | None = None


_DECODER = msgspec.json.Decoder(LineSettings)


def read_settings(stoker: str | bytes) -> LineSettings:
    """The settings as they were stored."""
    return _DECODER.decode(stoker)


def cache_mode_of(settings: LineSettings, batch: CacheMode) -> CacheMode:
    """Which earlier answers may serve a line: what it states itself, else what its batch does."""
    return settings.cache or batch
