"""What the commands print: results and ids to stdout, everything else to stderr; tables, progress, summaries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.tree import Tree

from runtime.redaction import harmless

PLAIN_LINE_EVERY_S = 5.0


class HarmlessConsole(Console):
    """A console on which text is only shown: it moves no cursor, names no window and fills no clipboard."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich renders it, without control characters in texts; rich's own are segments of their own."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(harmless(text), style)


stderr = HarmlessConsole(stderr=True, highlight=False, emoji=False)
stdout = HarmlessConsole(highlight=False, emoji=False)
WIDE = 1000


def say(message: str) -> None:
    """One line for people, to stderr."""
    stderr.print(message, markup=False, soft_wrap=True)


def emit(value: str) -> None:
    """A result or id, to stdout."""
    click.echo(value)


def emit_json(value: Any) -> None:
    """JSON to stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def emit_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table to stdout."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    _print(table)


def emit_tree(tree: Tree) -> None:
    """A tree to stdout, each line whole."""
    _print(tree)


def _print(shown: Table | Tree) -> None:
    if not stdout.is_terminal and (isinstance(shown, Tree) or "COLUMNS" not in os.environ):
        stdout.width = WIDE  # a program reads it: nothing is folded
    stdout.print(shown, soft_wrap=isinstance(shown, Tree))


_NUMBERS = frozenset(
    {
        "jobs",
        "done",
        "failed",
        "truncated",
        "empty",
        "tokens in",
        "tokens out",
        "cached",
        "billed",
        "own engines",
        "a managed API",
        "cost",
        "hours",
        "with a request",
        "slots used",
        "GPU used",
        "shards",
        "ready",
        "waiting",
        "passages",
        "bytes",
        "not yet in Chroma",
    }
)


@contextmanager
def bar(description: str, *, total: float | None) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, nothing elsewhere; call what it yields with the amount done."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)
