"""JSON that strangers wrote, as a page can show it: long texts and lists cut, and nothing that JSON cannot hold.

It must never refuse a text: what cannot be read as JSON is shown as the text that it is.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

WHOLE_CHARACTERS: Final = 200_000  # shown as they are, up to here; beyond, a browser stalls while it lays them out
TEXT_CHARACTERS: Final = 20_000  # of each text of a longer JSON
ITEMS: Final = 200  # of each list and object of it
CHARACTERS: Final = 400_000  # of all its texts together
VALUES: Final = 500_000  # in a JSON that is read: of more, 32 MB of text may become a gigabyte of objects
DEPTH: Final = 60  # pydantic refuses to write what is four times as deep
EXACT_BITS: Final = 53  # browsers round what is longer


class Shortener:
    """Cuts the JSON of one answer; `has_cut` tells whether anything is missing."""

    def __init__(self) -> None:
        self.has_cut = False
        self._left = CHARACTERS

    def read(self, text: str | None) -> Any:
        """The value of a JSON text, cut where that is long; None of None."""
        if text is None:
            return None
        if text.count(",") + text.count("[") > VALUES:
            return self._text(text, TEXT_CHARACTERS)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self._text(text, TEXT_CHARACTERS)
        is_short = len(text) <= WHOLE_CHARACTERS
        return self._value(
            value, WHOLE_CHARACTERS if is_short else TEXT_CHARACTERS, len(text) if is_short else ITEMS, 0
        )

    def _value(self, value: Any, characters: int, items: int, depth: int) -> Any:
        if not isinstance(value, (dict, list)):
            return self._single(value, characters)
        if depth == DEPTH:
            self.has_cut = True
            return "…"
        if isinstance(value, dict):
            return {
                self._text(name, characters): self._value(one, characters, items, depth + 1)
                for name, one in self._some(list(value.items()), items)
            }
        return [self._value(one, characters, items, depth + 1) for one in self._some(value, items)]

    def _single(self, value: Any, characters: int) -> Any:
        """A text, number, true, false or null; a number that not every reader takes becomes a text."""
        if isinstance(value, str):
            return self._text(value, characters)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, int) and value.bit_length() > EXACT_BITS:
            return self._text(str(value), characters)
        return value

    def _some(self, values: list[Any], items: int) -> list[Any]:
        self.has_cut = self.has_cut or len(values) > items
        return values[:items]

    def _text(self, text: str, characters: int) -> str:
        """A text that UTF-8 can hold: half of a surrogate pair, which escaped JSON may have, is a question mark."""
        most = min(characters, max(0, self._left))
        kept = text[:most].encode("utf-8", "replace").decode()
        self._left -= len(kept)
        if len(text) <= most:
            return kept
        self.has_cut = True
        return f"{kept}… ({len(text) - most:,} more characters)"
