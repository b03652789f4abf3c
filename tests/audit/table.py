"""The last audit in words, between two marks in docs/threats.md: `python -m tests.audit.table` writes it there."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/audit.json"
PAGE = ROOT / "docs/threats.md"
LINE_CHARACTERS = 138
BEGIN, END = "<!-- audit:begin -->\n", "<!-- audit:end -->"


def table(result: Mapping[str, Any]) -> str:
    """What was asked, what is known, and about what nobody answered."""
    silent = ", ".join(f"{one['name']} {one['version']}" for one in result["unanswered"])
    rows = [
        f"| {one['name']} {one['version']} | {', '.join(one['ids'])} | {', '.join(one['fixed_in']) or 'no version'} "
        f"| {'accepted' if one['accepted'] else 'NEW'} |"
        for one in result["faults"]
    ]
    return "\n".join(
        (
            f"{result['date']}: {result['pins']} pins, of which PyPI answered about {result['answered']}.",
            "",
            "| version | known as | fixed in | |",
            "|---|---|---|---|",
            *rows,
            "",
            *textwrap.wrap(f"No answer about: {silent or 'none'}.", LINE_CHARACTERS, break_on_hyphens=False),
            "",
        )
    )


def written(page: str, result: Mapping[str, Any]) -> str:
    """The page with this table."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(result) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), json.loads(RESULT.read_text())))
