"""All measured figures in one table: `python -m benchmarks.table` prints what benchmarks/results/ has.

A report that has its rows under `table` says them itself; those of before are read here. What was not measured is left
out, and a figure that falls short of its target says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.cache_rows import PARTS, cache_rows
from benchmarks.paired import RESULTS, Ratio
from benchmarks.rows import Row, at_least, at_most, bold

# The order of the table; further reports with rows of their own follow by name.
ORDER: Final = (
    "end_to_end",
    "pipeline",
    "growth",
    "submit",
    "order",
    "refill",
    "front_end",
    "dispatch",
    "chaos",
    *PARTS,
)
# Targets of ours ÷ the bare engine.
END_TO_END: Final = {
    ("pinned", "8 tokens", "chat"): 0.85,
    ("pinned", "64 tokens", "chat"): 0.95,
    ("pinned", "256 tokens", "chat"): 0.95,
    ("pinned", "64 tokens", "run-batch"): 0.97,
}
BARE: Final = {
    "chat": "vLLM's offline LLM.chat",
    "run-batch": "vLLM's run-batch",
    "http": "our client straight to vLLM's server",
}
SHOWN: Final = "64 tokens"
MADE_BY: Final = "`make bench-end-to-end`"
STARVATION: Final = 0.02
# What is known to be wrong with a kept report: (report, its commit, what the figure has in it, what to say). A new run
# has another commit, and the entry is to go with it.
FAULTS: Final = (
    (
        "pipeline",
        "be1ce7b",
        "(prefork 8); on one core",
        "pool chosen by one probe, where it did 687 jobs/s: by that 7.9",
    ),
    ("pipeline", "be1ce7b", "on all cores", "2 pairs"),
    ("pipeline", "be1ce7b", "CPU of a job", "submit is not in it"),
    ("submit", "da1590d", "1,000,000", "2 pairs at 1,000,000"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of one benchmark, and where and when they were measured."""

    name: str
    rows: list[Row]
    machine: str
    day: str
    commit: str


def reports() -> list[Report]:
    """Those that have been measured, in the table's order."""
    files = {path.stem: path for path in sorted(RESULTS.glob("*.json")) if ".partial" not in path.name}
    names = [name for name in ORDER if name in files] + [name for name in files if name not in ORDER]
    return [report for name in names if (report := _report(name, files[name])) is not None]


def main() -> None:
    """Print the table."""
    table = Table("figure", "measured", "target", "command", show_lines=True)
    for row in (row for report in reports() for row in report.rows):
        table.add_row(*(cell.replace("**", "") for cell in (row.figure, row.measured, row.verdict, row.command)))
    Console().print(table)


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
    day = str(made.get("date") or made.get("when") or "no day")[:10]
    commit = str(made.get("commit", "unknown"))
    return Report(name, [_with_faults(name, commit, row) for row in rows], machine, day, commit) if rows else None


def _with_faults(name: str, commit: str, row: Row) -> Row:
    """The row with its known faults; one that falls short of its target stands in README.md, whatever it is of."""
    said = [fault for of, at, part, fault in FAULTS if (of, at) == (name, commit) and part in row.figure]
    measured = f"{row.measured}; **fault: {'; '.join(said)}**" if said else row.measured
    return replace(row, measured=measured, headline=row.headline or row.is_met is False)


def _end_to_end_rows(found: dict[str, Any]) -> list[Row]:
    rows = []
    for measured in found.get("rows", ()):
        workload, cores, jobs = measured["workload"]["name"], measured["cores"], measured["workload"]["jobs"]
        where = "engine on one core, all else on another" if cores == "pinned" else "all cores"
        for side, spread in measured["ratio"].items():
            ratio, target = Ratio(**spread), END_TO_END.get((cores, workload, side))
            rows.append(
                Row(
                    f"tokens/s of {jobs:,} jobs ({workload}) through RabbitMQ and Postgres ÷ {BARE[side]}; {where}",
                    bold(ratio),
                    MADE_BY,
                    headline=cores == "pinned" and side != "http",
                    **({} if target is None else at_least(ratio, target)),
                )
            )
        ours = measured["ours"]
        figure = f"{workload}: slots empty while the batch has jobs to send, by vLLM's metrics, one leg; {where}"
        starved = at_most(100 * ours["starvation"], 100 * STARVATION, "%")
        rows.append(
            Row(
                figure,
                f"**{ours['starvation']:.1%}**",
                MADE_BY,
                headline=cores == "pinned" and workload == SHOWN,
                **starved,
            )
        )
        figure = f"{workload}: CPU outside ÷ inside the engine; µs outside it a job, our watching included; {where}"
        outside = f"**{ours['outside_by_inside']:.3f}**; {ours['outside_us_a_job']:,.0f}"
        rows.append(Row(figure, outside, MADE_BY))
    return rows


def _dispatch_rows(found: dict[str, Any]) -> list[Row]:
    first, last = found["rows"][0], found["rows"][-1]
    figure = (
        f"the dispatch leader's sweep at {first['shards']:,} and at {last['shards']:,} shards; shards claimed before a "
        "new tenant's first"
    )
    sweeps = f"**{first['sweep_ms_median']:.1f} and {last['sweep_ms_median']:.1f} ms**"
    return [Row(figure, f"{sweeps}; {last['claims_before_the_newcomers_shards'][0]}", "`make bench-dispatch`")]


def _chaos_rows(found: dict[str, Any]) -> list[Row]:
    figure = (
        f"{found['jobs']:,} jobs of {found['job_s']} s on {found['workers']} workers under {len(found['injected'])} "
        "faults: lost, doubled, wrongly blamed; run again"
    )
    counts = f"**{found['lost']}, {found['duplicated']}, {found['blamed']}**"
    repeated = f"{found['repeated'] / found['jobs']:.2%}"
    return [Row(figure, f"{counts}; {repeated}", "`make chaos`", headline=True)]


READERS: Final[dict[str, Callable[[dict[str, Any]], list[Row]]]] = {
    "end_to_end": _end_to_end_rows,
    "dispatch": _dispatch_rows,
    "chaos": _chaos_rows,
}


if __name__ == "__main__":
    main()
