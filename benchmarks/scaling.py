"""The tables of docs/scaling.md, from benchmarks/results/: what ten million jobs did, and the arithmetic of more GPUs.

Every number is measured or computed here from measured ones, but for ASSUMED: how many jobs a GPU answers a second is
nobody's to know before it is tried.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gateway import LINES
from benchmarks.paired import RESULTS
from benchmarks.size_report import COUNTED, between, edge_samples, edges, least, of

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
    asked = [
        (name, f"{took['median_ms']:.0f} ms", f"{took['most_ms']:.0f} ms")
        for name, took in report["full"]["questions"].items()
    ]
    return "\n\n".join(
        (
            _markdown(("what", "took", "that is", "memory or bytes"), [*_in_and_through(report), *_out(report)]),
            f"Questions about one batch of {report['jobs'] // 2:,} jobs when all had ended, five times each:",
            _markdown(("question", "median", "most"), asked),
            _made(report),
        )
    )


def _in_and_through(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    run = report["run"]
    first, last = edges(run["samples"])
    ends = ", ".join(f"{seconds:.1f}" for seconds in run["finish_s"])
    load = ", ".join(f"{load:.0f}" for load in run["load"])
    return [
        *(
            (f"submit of {one['rows']:,} lines", _s(one["seconds"]), _rate(one, "lines"), f"{one['peak_mb']:.0f} MB")
            for one in report["submit"]["submits"]
        ),
        ("run, from the worker's start", _s(run["seconds"]), f"{run['jobs_per_s']:,} jobs/s", f"load {load}"),
        _edge("its first tenth", first),
        _edge("its last tenth", last),
        ("the end of each batch: its results counted", f"{ends} s", "", ""),
    ]


def _out(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Downloads, the dump, its restore where it was tried, and retention."""
    dump, dropped, deleted = report["dump"], report["retention"]["dropped"], report["retention"]["deleted"]
    rows = [
        (f"download of {one['rows']:,} results", _s(one["seconds"]), _rate(one, "rows"), f"{one['peak_mb']:.0f} MB")
        for one in report["download"]["downloads"]
    ]
    rows.append((f"`pg_dump {dump['options']}`", _s(dump["seconds"]), "", f"{dump['bytes'] / 1e9:.1f} GB"))
    if restored := report.get("restore"):
        rate = f"{restored['jobs'] / restored['seconds']:,.0f} jobs/s, results included"
        rows.append(("`pg_restore -j 2` of it", _s(restored["seconds"]), rate, ""))
    return [
        *rows,
        (
            f"retention: {dropped['rows']:,} rows of last week, dropped",
            _s(dropped["seconds"]),
            f"{dropped['bytes_freed'] / 1e9:.1f} GB free",
            f"WAL {dropped['wal_bytes'] / 1e6:.1f} MB",
        ),
        (
            f"retention: {deleted['rows']:,} rows of this week, deleted",
            _s(deleted["seconds"]),
            _rate(deleted, "rows"),
            f"WAL {deleted['wal_bytes'] / 1e6:,.0f} MB; then a VACUUM of {_s(deleted['vacuum_s'])}",
        ),
    ]


def _rate(found: Mapping[str, Any], what: str) -> str:
    return f"{found['rows_per_s']:,} {what}/s"


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
    begun, early, late, last = edge_samples(report["run"]["samples"])
    rows: list[tuple[str, ...]] = []
    for query in sorted(last["statements"], key=lambda name: -last["statements"][name]["ms"]):
        first_calls, last_calls = _calls(begun, early, query), _calls(late, last, query)
        if first_calls and last_calls:
            (_, ms, blocks), (calls, last_ms, last_blocks) = first_calls, last_calls
            rows.append((f"`{query}`", f"{calls:,}", f"{ms:.2f}, {last_ms:.2f}", f"{blocks:.0f}, {last_blocks:.0f}"))
    head = ("statement", "calls of the last tenth", "ms a call, first and last tenth", "blocks a call, the same")
    slowest = [one for one in report["run"]["statements"]["by_total"] if one["slowest_plan"]][:PLANS]
    plans = "\n\n".join(
        f"{one['query'][:100]}…\n{one['slowest_plan']['ms']:.0f} ms\n  " + "\n  ".join(one["slowest_plan"]["plan"])
        for one in slowest
    )
    shown = _markdown(head, rows[:SHOWN_STATEMENTS])
    return f"{shown}\n\nThe slowest call of some, as auto_explain saw it:\n\n```\n{plans}\n```"


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
    jobs, run = report["jobs"], report["run"]
    cost = between(run["samples"][0], run["samples"][-1])
    stored = sum(of(report["full"]["tables"], "heap_bytes", "index_bytes", "toast_bytes").values()) / jobs
    wal = (report["submit"]["wal_bytes"] + run["wal_bytes"]) / jobs
    transactions = run["transactions"] / jobs
    submitted = least(report["submit"]["submits"], "rows_per_s")
    uploaded = _uploaded()
    freeze_age = int(report["postgres"]["autovacuum_freeze_max_age"])
    cases = [(gpus, each) for each in ASSUMED for gpus in GPUS]
    by_rate: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("jobs/s", "assumed", "{:,.0f}".format),
        ("cores of Postgres", f"{cost['postgres']:.0f} µs a job", _per_s(cost["postgres"] / 1e6, 3)),
        ("cores of all but engines", f"{cost['cpu_us']:.0f} µs a job", _per_s(cost["cpu_us"] / 1e6, 3)),
        ("WAL, MB/s", f"{wal:,.0f} bytes a job", _per_s(wal / 1e6, 2)),
        ("transactions/s", f"{transactions:.4f} a job", _per_s(transactions, 1)),
        ("GB a day in Postgres", f"{stored:,.0f} bytes a job", _per_s(DAY_S * stored / 1e9, 1)),
        (f"TB at {RETENTION_DAYS} days", "the same", _per_s(RETENTION_DAYS * DAY_S * stored / 1e12, 2)),
        (
            "days to a freezing vacuum",
            f"{freeze_age:,} transactions",
            lambda rate: f"{freeze_age / (rate * transactions * DAY_S):,.0f}",
        ),
        ("submits side by side", f"{submitted:,} lines/s", _per_s(1 / submitted, 3)),
        ("uploads side by side", f"{uploaded:,.0f} lines/s", _per_s(1 / uploaded, 3)),
    )
    rows = [(name, how, *(shown(gpus * each) for gpus, each in cases)) for name, how, shown in by_rate]
    head = ("", "measured", *(f"{gpus} × {each}/s" for gpus, each in cases))
    return _markdown(head, [*rows, *_by_workers(report, [gpus for gpus, _ in cases])])


def _by_workers(report: Mapping[str, Any], gpus: Sequence[int]) -> list[tuple[str, ...]]:
    connections = max(sample["connections"] for sample in report["run"]["samples"]) - 1  # the sampler has a second one
    fills = {row["children"]: row for row in json.loads((RESULTS / "dispatch_children.json").read_text())["rows"]}
    return [
        ("connections", f"{connections} of a worker", *(f"{count * connections:,}" for count in gpus)),
        *(
            (
                f"a {what} of the leader, ms",
                f"at {', '.join(map(str, fills))} children",
                *(f"{_at(fills, count)[f'{what}_ms_median']:.1f}" for count in gpus),
            )
            for what in ("fill", "sweep")
        ),
    ]


def _uploaded() -> float:
    """Lines/s of one file through the gateway, from its first byte until its batch is going, beside others."""
    uploads = json.loads((RESULTS / "gateway.json").read_text())["legs"]["paced, beside"]["uploads"]
    return statistics.median(LINES / float(upload["going_s"]) for upload in uploads)


def _per_s(each: float, digits: int) -> Callable[[float], str]:
    return lambda rate: f"{rate * each:,.{digits}f}"


def _at(fills: Mapping[int, Mapping[str, Any]], gpus: int) -> Mapping[str, Any]:
    """What was measured with the number of children next above."""
    return fills[min((count for count in fills if count >= gpus * CHILDREN_A_WORKER), default=max(fills))]


def _s(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _made(report: Mapping[str, Any]) -> str:
    made, settings = report["made_with"], report["postgres"]
    return (
        f"On {made['cores']} cores of an {made['cpu']}, {made['date']}, commit {made['commit']}, beside other work; "
        f"Postgres {settings['server_version']} on the disk, shared_buffers {settings['shared_buffers']}, max_wal_size "
        f"{settings['max_wal_size']}, fsync {settings['fsync']}; RabbitMQ {report['servers']['rabbitmq']}."
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))
