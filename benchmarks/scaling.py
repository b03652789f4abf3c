"""The tables of docs/scaling.md, from benchmarks/results/: what ten million jobs did, and the arithmetic of more GPUs.

Every number is measured or computed here from measured ones, but for ASSUMED: how many jobs a GPU answers a second is
nobody's to know before it is tried.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.paired import RESULTS
from benchmarks.size_report import COUNTED, between, edges

SCALING: Final = Path(__file__).parents[1] / "docs" / "scaling.md"
PARTS: Final = ("size", "tables", "statements", "arithmetic")
ASSUMED: Final = (5, 50)  # jobs a second of a GPU: long answers, short ones
GPUS: Final = (1, 10, 100)
CHILDREN_A_WORKER: Final = 2  # of an engine of up to 1,024 sequences
DAY_S: Final = 86_400
RETENTION_DAYS: Final = 30
SHOWN_STATEMENTS: Final = 6
PLANS: Final = 3
NOT_YET: Final = "Not measured yet: `make bench-size`."


def text() -> str:
    """docs/scaling.md with its tables in their places."""
    written, path = SCALING.read_text(), RESULTS / "size.json"
    report = json.loads(path.read_text()) if path.exists() else None
    for part, make in zip(PARTS, (_size, _tables, _statements, _arithmetic), strict=True):
        marks = re.compile(rf"(<!-- {part}:begin -->\n).*?(<!-- {part}:end -->)", re.DOTALL)
        made = NOT_YET if report is None else make(report)
        written, times = marks.subn(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", written)  # type: ignore[misc]
        if times != 1:
            raise SystemExit(f"{SCALING.name} has {times} places for {part}, not one")
    return written


def _size(report: Mapping[str, Any]) -> str:
    run, retention = report["run"], report["retention"]
    first, last = edges(run["samples"])
    rows = [
        (
            f"submit of {one['rows']:,} lines",
            _s(one["seconds"]),
            f"{one['rows_per_s']:,} lines/s",
            f"{one['peak_mb']:.0f} MB",
        )
        for one in report["submit"]["submits"]
    ]
    rows += [
        ("run, from the worker's start", _s(run["seconds"]), f"{run['jobs_per_s']:,} jobs/s", _load(run)),
        *(_edge(name, found) for name, found in (("its first tenth", first), ("its last tenth", last))),
        ("the end of each batch: its results counted", ", ".join(f"{s:.1f}" for s in run["finish_s"]) + " s", "", ""),
    ]
    rows += [
        (
            f"download of {one['rows']:,} results",
            _s(one["seconds"]),
            f"{one['rows_per_s']:,} rows/s",
            f"{one['peak_mb']:.0f} MB",
        )
        for one in report["download"]["downloads"]
    ]
    dropped, deleted, dump = retention["dropped"], retention["deleted"], report["dump"]
    rows += [
        (f"`pg_dump {dump['options']}`", _s(dump["seconds"]), "", f"{dump['bytes'] / 1e9:.1f} GB"),
        *(
            [
                (
                    "`pg_restore -j 2` of it",
                    _s(restored["seconds"]),
                    f"{restored['jobs'] / restored['seconds']:,.0f} jobs/s",
                    "",
                )
            ]
            if (restored := report.get("restore"))
            else []
        ),
        (
            f"retention: {dropped['rows']:,} rows of last week, dropped",
            _s(dropped["seconds"]),
            f"{dropped['bytes_freed'] / 1e9:.1f} GB free",
            f"WAL {dropped['wal_bytes'] / 1e6:.1f} MB",
        ),
        (
            f"retention: {deleted['rows']:,} rows of this week, deleted",
            _s(deleted["seconds"]),
            f"{deleted['rows_per_s']:,} rows/s",
            f"WAL {deleted['wal_bytes'] / 1e6:,.0f} MB; VACUUM {_s(deleted['vacuum_s'])}",
        ),
    ]
    asked = [
        (name, f"{took['median_ms']:.0f} ms", f"{took['most_ms']:.0f} ms")
        for name, took in report["full"]["questions"].items()
    ]
    return "\n\n".join(
        (
            _markdown(("what", "took", "that is", "memory or bytes"), rows),
            f"Questions about one batch of {report['jobs'] // 2:,} jobs when all had ended, five times each:",
            _markdown(("question", "median", "most"), asked),
            _made(report),
        )
    )


def _edge(name: str, found: Mapping[str, float]) -> tuple[str, str, str, str]:
    spent = ", ".join(f"{stage} {found[stage]:.0f}" for stage in COUNTED if found[stage] >= 1)
    return (
        f"{name}: {found['jobs']:,} jobs",
        f"{found['cpu_us']:.0f} µs of CPU a job",
        f"{found['jobs_per_s']:,.0f} jobs/s; a sweep {found['sweep_ms']:.0f} ms",
        spent,
    )


def _tables(report: Mapping[str, Any]) -> str:
    rows = [
        (
            f"`{table['table']}`",
            f"{table['rows']:,}",
            *(f"{table[name] / 1e6:,.0f}" for name in ("heap_bytes", "index_bytes", "toast_bytes")),
            f"{table['hot_updated'] / table['updated']:.0%} of {table['updated']:,}" if table["updated"] else "",
            f"{table['dead']:,}",
            f"{table['autovacuums']}, {table['autovacuum_s']:.0f} s",
            f"{table['autoanalyzes']}, {table['autoanalyze_s']:.0f} s",
        )
        for table in report["full"]["tables"]
    ]
    head = ("table", "rows", "MB", "of indexes", "of TOAST", "HOT updates", "dead", "autovacuums", "autoanalyzes")
    return _markdown(head, rows)


def _statements(report: Mapping[str, Any]) -> str:
    samples = report["run"]["samples"]
    jobs = samples[-1]["done"]
    early = next(sample for sample in samples if sample["done"] >= 0.1 * jobs)
    late = next(sample for sample in reversed(samples) if sample["done"] <= 0.9 * jobs)
    begun = next(sample for sample in samples if sample["done"] > 0)
    rows = []
    for query in sorted(late["statements"], key=lambda name: -late["statements"][name]["ms"]):
        pairs = [_calls(one, other, query) for one, other in ((begun, early), (late, samples[-2]))]
        if all(pairs) and len(rows) < SHOWN_STATEMENTS:
            (_, ms, blocks), (calls, last_ms, last_blocks) = (pair for pair in pairs if pair)
            rows.append((f"`{query}`", f"{calls:,}", f"{ms:.2f}, {last_ms:.2f}", f"{blocks:.0f}, {last_blocks:.0f}"))
    head = ("statement", "calls of the last tenth", "ms a call, first and last tenth", "blocks a call, the same")
    slowest = [one for one in report["run"]["statements"]["by_total"] if one["slowest_plan"]][:PLANS]
    plans = "\n\n".join(
        f"{one['query'][:100]}…\n{one['slowest_plan']['ms']:.0f} ms\n  " + "\n  ".join(one["slowest_plan"]["plan"])
        for one in slowest
    )
    return f"{_markdown(head, rows)}\n\nThe slowest call of some, as auto_explain saw it:\n\n```\n{plans}\n```"


def _calls(one: Mapping[str, Any], other: Mapping[str, Any], query: str) -> tuple[int, float, float] | None:
    """(calls, ms of one, blocks of one) between two samples; None if it was not among both's most expensive."""
    if query not in one["statements"] or query not in other["statements"]:
        return None
    before, after = one["statements"][query], other["statements"][query]
    calls = after["calls"] - before["calls"]
    if not calls:
        return None
    return calls, (after["ms"] - before["ms"]) / calls, (after["blocks"] - before["blocks"]) / calls


def _arithmetic(report: Mapping[str, Any]) -> str:
    jobs, run, submit = report["jobs"], report["run"], report["submit"]
    whole = between(run["samples"][0], run["samples"][-1])
    stored = sum(t["heap_bytes"] + t["index_bytes"] + t["toast_bytes"] for t in report["full"]["tables"])
    wal = (submit["wal_bytes"] + run["wal_bytes"]) / jobs
    transactions = run["transactions"] / jobs
    connections = max(sample["connections"] for sample in run["samples"]) - 1  # the sampler's own other one
    fills = {row["children"]: row for row in json.loads((RESULTS / "dispatch_children.json").read_text())["rows"]}
    submitted = min(one["rows_per_s"] for one in submit["submits"])
    settings = report["postgres"]
    freeze_age = int(settings["autovacuum_freeze_max_age"])
    cases = [(gpus, each, gpus * each) for each in ASSUMED for gpus in GPUS]

    def row(name: str, how: str, values: Iterable[str]) -> tuple[str, ...]:
        return name, how, *values

    rows: list[tuple[str, ...]] = [
        row("jobs/s", "assumed", (f"{rate:,}" for *_, rate in cases)),
        row(
            "cores of Postgres",
            f"{whole['postgres']:.0f} µs a job",
            (_cores(rate, whole["postgres"]) for *_, rate in cases),
        ),
        row(
            "cores of all but engines",
            f"{whole['cpu_us']:.0f} µs a job",
            (_cores(rate, whole["cpu_us"]) for *_, rate in cases),
        ),
        row("WAL, MB/s", f"{wal:,.0f} bytes a job", (f"{rate * wal / 1e6:,.2f}" for *_, rate in cases)),
        row(
            "transactions/s",
            f"{transactions:.3f} a job",
            (f"{rate * transactions:,.1f}" for *_, rate in cases),
        ),
        row(
            "GB a day in Postgres",
            f"{stored / jobs:,.0f} bytes a job",
            (f"{rate * DAY_S * stored / jobs / 1e9:,.1f}" for *_, rate in cases),
        ),
        row(
            f"TB at {RETENTION_DAYS} days",
            "",
            (f"{rate * DAY_S * RETENTION_DAYS * stored / jobs / 1e12:,.2f}" for *_, rate in cases),
        ),
        row(
            "days to a freezing vacuum",
            f"{freeze_age:,} transactions",
            (f"{freeze_age / (rate * transactions * DAY_S):,.0f}" for *_, rate in cases),
        ),
        row(
            "submits side by side",
            f"{submitted:,} lines/s",
            (f"{rate / submitted:.3f}" for *_, rate in cases),
        ),
        row("connections", f"{connections} of one worker", (f"{gpus * connections:,}" for gpus, *_ in cases)),
        row(
            "a fill of the leader's window, ms",
            f"at {', '.join(map(str, fills))} children",
            (f"{_fill_ms(fills, gpus):.1f}" for gpus, *_ in cases),
        ),
    ]
    head = ("", "measured", *(f"{gpus} × {each}/s" for gpus, each, _ in cases))
    return _markdown(head, rows)


def _fill_ms(fills: Mapping[int, Mapping[str, Any]], gpus: int) -> float:
    """Of the measured number of children next above."""
    children = min((count for count in fills if count >= gpus * CHILDREN_A_WORKER), default=max(fills))
    return float(fills[children]["fill_ms_median"])


def _cores(rate: float, us: float) -> str:
    return f"{rate * us / 1e6:.3f}"


def _s(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _load(found: Mapping[str, Any]) -> str:
    return f"load {', '.join(f'{load:.0f}' for load in found['load'])}"


def _made(report: Mapping[str, Any]) -> str:
    made, settings = report["made_with"], report["postgres"]
    return (
        f"On {made['cores']} cores of an {made['cpu']}, {made['date']}, commit {made['commit']}, beside other work; "
        f"Postgres {settings['server_version']} on the disk, shared_buffers {settings['shared_buffers']}, max_wal_size "
        f"{settings['max_wal_size']}, fsync {settings['fsync']}; RabbitMQ {report['servers']['rabbitmq']}."
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))
