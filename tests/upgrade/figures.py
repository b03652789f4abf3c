"""What Postgres's rows and its log say of an upgrade: speed and gaps by phase, waits for tables, errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Final

from tests.chaos.system import System
from tests.upgrade.waits import TableWaits

_LINE: Final = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) \w+ \[(\d+)\] ([A-Z]+):  (.*)$")
# Of any process, in its log: a schema that is not the one it was written for, or a defect.
_FAULTS: Final = re.compile(
    r"Traceback|UndefinedColumn|UndefinedTable|lacks a (?:table|column)|cached plan|ValidationError|_defect"
)


@dataclass(frozen=True, slots=True)
class PhaseFigures:
    """One phase: results committed in it, the longest time without one, waits for a table that were seen."""

    name: str
    seconds: float
    jobs: int
    jobs_per_s: float
    longest_gap_s: float
    table_waits: int
    longest_table_wait_s: float


@dataclass(frozen=True, slots=True)
class Said:
    """A line of Postgres's log."""

    at: float
    pid: int
    severity: str
    message: str


def figures_of(system: System, marks: Sequence[tuple[str, float]], waits: TableWaits) -> list[PhaseFigures]:
    """Each phase of `marks` (name, when it began; the last one is the end)."""
    rows = system.query("SELECT extract(epoch FROM created_at) FROM results ORDER BY created_at")
    results = [float(row[0]) for row in rows]
    figures = []
    for (name, began), (_, end) in pairwise(marks):
        within = [at for at in results if began <= at < end]
        gaps = [b - a for a, b in pairwise([began, *within, end])]
        waited = waits.within(began, end)
        figures.append(
            PhaseFigures(
                name,
                round(end - began, 1),
                len(within),
                round(len(within) / (end - began), 1),
                round(max(gaps), 2),
                len(waited),
                round(max(waited, default=0.0), 2),
            )
        )
    return figures


def postgres_lines(log: Path) -> list[Said]:
    """Its log, but for details and statements."""
    found = (_LINE.match(line) for line in log.read_text(errors="replace").splitlines())
    return [
        Said(datetime.fromisoformat(line[1]).replace(tzinfo=UTC).timestamp(), int(line[2]), line[3], line[4])
        for line in found
        if line is not None
    ]


def errors_in(lines: Sequence[Said], *, since: float, until: float) -> Counter[str]:
    """The errors that Postgres answered in that time, by message."""
    return Counter(said.message for said in lines if said.severity == "ERROR" and since <= said.at < until)


def faults_in(log: str) -> list[str]:
    """The lines of a process's log that tell of a schema that it does not know, or of a defect."""
    return [line[:300] for line in log.splitlines() if _FAULTS.search(line)]
