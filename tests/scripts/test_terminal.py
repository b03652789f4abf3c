"""What strangers wrote is shown on a terminal, which obeys none of it."""

from __future__ import annotations

import io
import re

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from scripts.terminal import HarmlessConsole

HOSTILE = "name\x1b]52;c;ZXZpbA==\x07 \x1b[2J\x9b2J\x1bc\r\x7f\x00\x08 \u202e\u2066 end of it"
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")  # rich's colours, cursor and lines


def told(shown: RenderableType) -> str:
    """What a terminal receives, without rich's own sequences."""
    console = HarmlessConsole(file=io.StringIO(), force_terminal=True, width=200)
    console.print(shown, markup=False)
    assert isinstance(console.file, io.StringIO)
    return OURS.sub("", console.file.getvalue())


def test_no_text_reaches_a_terminal_as_an_order() -> None:
    table = Table(title="batches")
    table.add_column("name")
    table.add_row(f"[bold]{escape(HOSTILE)}[/bold]")
    for shown in (HOSTILE, table):
        text = told(shown)
        assert "name" in text and "end" in text
        assert [one for one in text if not one.isprintable() and one != "\n"] == []


def test_a_bar_still_moves() -> None:
    console = HarmlessConsole(file=io.StringIO(), force_terminal=True)
    with Progress(console=console) as progress:
        progress.update(progress.add_task("jobs", total=2), completed=1)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25l" in console.file.getvalue() and "\x1b[2K" in console.file.getvalue()
