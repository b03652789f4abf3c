"""Templates of prompts, and how a value becomes text. Slots are as the server has them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

SLOT: Final = re.compile(r"\{([A-Za-z_]\w*)\}")
_PANDAS_NULLS: Final = frozenset({"NAType", "NaTType"})


class Template:
    """A prompt with slots such as `{text}`. Every other brace is text; there is no escaping."""

    def __init__(self, text: str) -> None:
        self.text = text
        parts = SLOT.split(text)  # text, slot, text, …
        self.slots: tuple[str, ...] = tuple(dict.fromkeys(parts[1::2]))
        places = {slot: place for place, slot in enumerate(self.slots)}
        self._literals = parts[0::2]
        self._places = [places[slot] for slot in parts[1::2]]

    def fill(self, values: Sequence[str]) -> str:
        """The prompt with these values, one for each of `slots`, in that order."""
        filled = [self._literals[0]]
        for place, literal in zip(self._places, self._literals[1:], strict=True):
            filled += (values[place], literal)
        return "".join(filled)


def is_null(value: Any) -> bool:
    """Whether a value is missing: None, NaN, pandas' NA and NaT."""
    if isinstance(value, str):
        return False
    if isinstance(value, float | Decimal):
        return value != value  # noqa: PLR0124  # only NaN differs from itself
    return value is None or type(value).__name__ in _PANDAS_NULLS


def text_of(value: Any) -> str:
    """A value that is no null as text. Raises TypeError for a kind of value that has no text of its own."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal | UUID):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple | dict):
        return compact(value)
    return text_of(_plain(value))


def compact(value: Any) -> str:
    """A value as JSON without spaces. Raises TypeError for what that cannot hold."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_inner)


def _plain(value: Any) -> Any:
    """What numpy's and polars' own objects hold. Raises TypeError for any other."""
    library = type(value).__module__.partition(".")[0]
    for method in ("tolist", "to_list"):
        if library in ("numpy", "polars", "pandas") and hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(type(value).__name__)


def _inner(value: Any) -> Any:
    """What stands for a value inside JSON that is none of its own."""
    if isinstance(value, Decimal | UUID | date | time):
        return text_of(value)
    return None if is_null(value) else _plain(value)
