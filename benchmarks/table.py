"""All measured figures in one table: `python -m benchmarks.table` prints what benchmarks/results/ has.

A report that has its rows under `table` says them itself; those of before are read here. What was not measured is left
out, and a figure that falls short of its target says so.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.cache_rows import PARTS, cache_rows
from benchmarks.paired import RESULTS
from benchmarks.rows import COLUMNS, Row

# The order of the table; further reports with rows of their own follow by name.
ORDER: Final = (
    "end_to_end",
    "pipeline",
    "growth",
    "submit",
    "gateway",
    "order",
    "refill",
    "front_end",
    "dispatch",
    "chaos",
    "chaos_long_jobs",
    *PARTS,
)


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of one benchmark, and where and when they were measured."""

    name: str
    rows: list[Row]
    machine: str
    day: str
    commit: str
    note: str = ""

    @property
    def made(self) -> str:
        """What it is, and where and when it was measured."""
        return f"{self.name}: on {self.machine}, {self.day}, commit {self.commit}. {self.note}".rstrip()


def reports() -> list[Report]:
    """Those that have been measured, in the table's order."""
    files = {path.stem: path for path in sorted(RESULTS.glob("*.json")) if ".partial" not in path.name}
    names = [name for name in ORDER if name in files] + [name for name in files if name not in ORDER]
    return [report for name in names if (report := _report(name, files[name])) is not None]


def main() -> None:
    """Print the table; a row a line where nobody looks at it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    console, found = Console(), reports()
    for report in found:
        if not console.is_terminal:
            print(f"{report.made}\n{markdown(report.rows)}\n")
            continue
        table = Table(*COLUMNS, title=report.made, title_justify="left", show_lines=True)
        for row in report.rows:
            table.add_row(*(cell.replace("**", "") for cell in row.cells))
        console.print(table)


def markdown(rows: Iterable[Row]) -> str:
    """A table, one row a figure."""
    cells = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _report(name: str, path: Path) -> Report | None:
    found: dict[str, Any] = json.loads(path.read_text())
    if "table" in found:
        rows = [Row(**row) for row in found["table"]]
    elif name in PARTS:
        rows = cache_rows(name, found)
    elif name in READERS:
        rows = READERS[name](found)
    else:
        return None
    made = found.get("made_with", found)
    machine = f"{made.get('cores', '?')} cores of an {made['cpu']}" if "cpu" in made else "a machine that is not named"
    day = str(made.get("date") or "no day")[:10]
    commit = str(made.get("commit", "unknown"))
    return Report(name, [_shown(row) for row in rows], machine, day, commit, found.get("note", "")) if rows else None


def _shown(row: Row) -> Row:
    """One that does not meet its target, or cannot, stands in README.md, whatever it is of."""
    return replace(row, headline=row.headline or (row.target != "" and not row.is_met))


def _dispatch_rows(found: dict[str, Any]) -> list[Row]:
    done = found["rows"][-1]["done_share"]
    alike = [row for row in found["rows"] if row["done_share"] == done]
    first, last = alike[0], alike[-1]
    figure = (
        f"the dispatch leader's sweep at {first['shards']:,} and at {last['shards']:,} shards, {done:.0%} of them "
        "done; shards claimed before a new tenant's first"
    )
    sweeps = f"**{first['sweep_ms_median']:.1f} and {last['sweep_ms_median']:.1f} ms**"
    return [Row(figure, f"{sweeps}; {last['claims_before_the_newcomers_shards'][0]}", "`make bench-dispatch`")]


def _chaos_rows(found: dict[str, Any]) -> list[Row]:
    figure = (
        f"{found['jobs']:,} jobs of {found['job_s']:g} s on {found['workers']} workers under {len(found['injected'])} "
        "faults: lost, doubled, wrongly blamed; run again"
    )
    counts = f"**{found['lost']}, {found['duplicated']}, {found['blamed']}**"
    repeated = f"{found['repeated'] / found['jobs']:.2%}"
    return [Row(figure, f"{counts}; {repeated}", f"`make chaos JOB_S={found['job_s']:g}`", headline=True)]


READERS: Final[dict[str, Callable[[dict[str, Any]], list[Row]]]] = {
    "dispatch": _dispatch_rows,
    "chaos": _chaos_rows,
    "chaos_long_jobs": _chaos_rows,
}


if __name__ == "__main__":
    main()
