"""What benchmarks/size.py's report says: the rows of the table of figures, and the tables of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.rows import Row, at_most

COMMAND: Final = "`make bench-size`"
MOST_COST: Final = 1.1  # CPU a job at the end ÷ at the beginning
EDGE: Final = 0.1  # the first and the last tenth of a run
COUNTED: Final = ("worker parent", "worker children", "dispatcher", "postgres", "rabbitmq", "redis")
SHOWN_QUESTIONS: Final = ("the view `backlog`", "`stoker status`", "a page of jobs, from the middle")

Samples = Sequence[Mapping[str, Any]]


def rows(report: Mapping[str, Any]) -> list[Row]:
    """The figures of a run that is whole up to retention."""
    jobs, run = report["jobs"], report["run"]
    submits, downloads = report["submit"]["submits"], report["download"]["downloads"]
    first, last = edges(run["samples"])
    ratio = last["cpu_us"] / first["cpu_us"]
    dropped, deleted = report["retention"]["dropped"], report["retention"]["deleted"]
    slowest = max(report["full"]["questions"].items(), key=lambda asked: asked[1]["median_ms"])
    stored_bytes = sum(of(report["full"]["tables"], "heap_bytes", "index_bytes", "toast_bytes").values())
    return [
        Row(
            f"CPU a job of worker, dispatch, brokers and Postgres in the last tenth of {jobs:,} jobs ÷ in the first",
            f"**{ratio:.2f}**; {last['cpu_us']:.0f} and {first['cpu_us']:.0f} µs; {run['jobs_per_s']:,} jobs/s beside "
            f"other work (load {run['load'][0]:.0f})",
            COMMAND,
            headline=True,
            **at_most(round(ratio, 3), MOST_COST),
        ),
        Row(
            "the leader's sweep in the last tenth of them, in the first",
            f"**{last['sweep_ms']:.0f} and {first['sweep_ms']:.0f} ms**",
            COMMAND,
        ),
        Row(
            f"two submits and two downloads of {jobs // 2:,} rows each: most memory of a process, MB; rows/s",
            f"**{most(submits, 'peak_mb'):.0f} and {most(downloads, 'peak_mb'):.0f}**; "
            f"{least(submits, 'rows_per_s'):,} and {least(downloads, 'rows_per_s'):,}",
            COMMAND,
            headline=True,
        ),
        Row(
            f"a batch of {jobs // 2:,} jobs, all done: the view `backlog`, `stoker status`, a page of its jobs; the "
            f"slowest question ({slowest[0]})",
            "**"
            + ", ".join(f"{report['full']['questions'][name]['median_ms']:.0f}" for name in SHOWN_QUESTIONS)
            + f" ms**; {slowest[1]['median_ms']:.0f} ms",
            COMMAND,
        ),
        Row(
            "bytes a job in Postgres, indexes included; of WAL from its submit to its result",
            f"**{stored_bytes / jobs:,.0f}; {(report['submit']['wal_bytes'] + run['wal_bytes']) / jobs:,.0f}**",
            COMMAND,
        ),
        Row(
            f"retention: {dropped['rows']:,} rows as a week's partitions; rows of this week deleted one by one",
            f"**{dropped['seconds']:.1f} s; {deleted['rows_per_s']:,} rows/s**",
            COMMAND,
            headline=True,
        ),
    ]


def edges(samples: Samples) -> tuple[dict[str, float], dict[str, float]]:
    """(the first tenth, the last tenth) of a run."""
    begun, early, late, last = edge_samples(samples)
    return between(begun, early), between(late, last)


def edge_samples(samples: Samples) -> Samples:
    """Where the first tenth begins and ends, and the last one; the sample at the very end is of the finishing."""
    jobs = samples[-1]["done"]
    begun = next(at for at, sample in enumerate(samples) if sample["done"] > 0)
    early = next(sample for sample in samples[begun + 1 :] if sample["done"] >= EDGE * jobs)
    late = next(sample for sample in reversed(samples[:-2]) if sample["done"] <= (1 - EDGE) * jobs)
    return samples[begun], early, late, samples[-2]


def between(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Jobs a second, CPU microseconds a job by stage and in all, and milliseconds of a sweep between two samples."""
    jobs, seconds = other["done"] - one["done"], other["at_s"] - one["at_s"]
    spent = {name: (other["cpu_s"][name] - one["cpu_s"][name]) / jobs * 1e6 for name in COUNTED}
    sweeps = max(1, other["sweeps"] - one["sweeps"])
    return {
        "jobs": jobs,
        "jobs_per_s": jobs / seconds,
        "cpu_us": sum(spent.values()),
        "sweep_ms": (other["sweep_s"] - one["sweep_s"]) / sweeps * 1000,
        **spent,
    }


def of(tables: Sequence[Mapping[str, Any]], *names: str) -> dict[str, int]:
    """The sum of these columns of every table."""
    return {table["table"]: sum(table[name] for name in names) for table in tables}


def most(found: Sequence[Mapping[str, Any]], name: str) -> float:
    """The largest of a figure."""
    return float(max(one[name] for one in found))


def least(found: Sequence[Mapping[str, Any]], name: str) -> int:
    """The smallest of a figure."""
    return int(min(one[name] for one in found))
