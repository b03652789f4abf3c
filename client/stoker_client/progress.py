"""What is shown while a run goes on: a bar, in a terminal or a notebook, and notes on stderr."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

with warnings.catch_warnings():  # in a notebook without ipywidgets tqdm warns, and shows a plain bar
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


class Progress:
    """The bar of one run; with `shown` False nothing is ever written."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._began: tuple[float, int] | None = None
        self._ticked = time.monotonic()
        self._seen: tuple[str, int, str] | None = None

    def say(self, note: str) -> None:
        """A line on stderr, above the bar."""
        if self._shown:
            tqdm.write(f"stoker: {note}", file=sys.stderr)

    def begin(self, what: str) -> None:
        """Show that something without a number goes on, which may take long."""
        self.close()
        self._bar = tqdm(desc=what, bar_format="{desc} {elapsed}", disable=not self._shown, leave=False)

    def tick(self) -> None:
        """It goes on; what is shown counts seconds."""
        if self._bar is not None and time.monotonic() - self._ticked >= 1.0:
            self._ticked = time.monotonic()
            self._bar.refresh()

    def follow(self, batch: dict[str, Any], *, total: int) -> None:
        """Show how far a batch is: rows, and tokens of answers a second since this run looks at it."""
        done = batch["request_counts"]["completed"] + batch["request_counts"]["failed"]
        tokens, now = batch["usage"]["output_tokens"], time.monotonic()
        what = f"{batch['id'][:18]} {batch['status']}"
        if self._began is None:
            self.close()
            self._began = (now, tokens)
            self._bar = tqdm(desc=what, total=total, initial=done, unit=" rows", disable=not self._shown)
            return
        began, before = self._began
        rate = f"{(tokens - before) / (now - began):,.0f} tokens/s" if tokens > before else ""
        if (what, done, rate) == self._seen:
            return
        self._seen = (what, done, rate)
        self._bar.set_description_str(what, refresh=False)
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        """Leave what is shown as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
