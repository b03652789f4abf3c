"""The table of a run, and its copy of the last one in docs/threats.md: python -m tests.fuzz.table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[2]
RESULT: Final = REPOSITORY / "benchmarks" / "results" / "fuzz.json"
DOCUMENT: Final = REPOSITORY / "docs" / "threats.md"
BEGIN, END = "<!-- fuzz:begin -->", "<!-- fuzz:end -->"
_HEAD: Final = (
    "| target | what is read | seconds | inputs | a second | edges | long inputs | up to | findings |",
    "|---|---|---|---|---|---|---|---|---|",
)


def table_of(targets: Sequence[Mapping[str, Any]], contract: Mapping[str, Any] | None = None) -> str:
    """The rows of a report, in Markdown."""
    rows = [*_HEAD, *map(_row, targets)]
    if contract is not None:
        rows += [
            "",
            f"The contract: {contract['requests']:,} requests in {contract['sequences']:,} sequences, "
            f"{contract['seconds']:,.0f} s; answers by status: {_statuses(contract['statuses'])}; "
            f"findings: {contract['findings']}.",
        ]
    return "\n".join(rows)


def _row(one: Mapping[str, Any]) -> str:
    speed = one["executions"] / max(1.0, one["guided_s"])
    return (
        f"| {one['name']} | {one['what']} | {one['seconds']:,.0f} | {one['executions']:,} | {speed:,.0f} "
        f"| {one['edges']:,} | {one['stretched']:,} | {one['longest_bytes'] >> 10:,} KB | {len(one['findings'])} |"
    )


def _statuses(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{status} {count:,}" for status, count in sorted(counts.items()))


def described(report: Mapping[str, Any]) -> str:
    """What the document says of the last run."""
    made = report["made_with"]
    machine = f"{made['cpu']}, {made['cores']} cores, load {made['load_before']} before"
    head = (
        f"The last run of `make fuzz` (commit {made['commit']}, {made['date']}, {machine}, atheris {made['atheris']}):"
    )
    return f"{head}\n\n{table_of(report['targets'], report['contract'])}"


def main() -> None:
    """Write the table between the document's marks."""
    text = DOCUMENT.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        sys.exit(f"{DOCUMENT}: has no {BEGIN} … {END}")
    table = described(json.loads(RESULT.read_text()))
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
