"""Writes the table of metrics into docs/operations.md, from runtime/metrics.py: `make dashboard`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from runtime.metrics import CATALOGUE

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
BEGIN, END = "<!-- metrics:begin -->", "<!-- metrics:end -->"


def table() -> str:
    """All metrics as Markdown, in the catalogue's order."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |\n" for metric in CATALOGUE
    ]
    return "| name | kind | labels | meaning |\n|---|---|---|---|\n" + "".join(rows)


def with_table(page: str) -> str:
    """The page with the table between its marks as it must be."""
    return re.sub(f"(?s)(?<={BEGIN}\n).*(?={END})", lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
