"""Submit and download at growing sizes: rows/s, memory, and what a job costs: `python -m benchmarks.submit`.

Each side runs in a process of its own (benchmarks/submit_sides.py); sides and sizes take turns. `seconds` are of the
work, `wall_s` have the process's start, imports and end with them. Short lines are stored as they come; at the largest
size also longer ones about documents, in the order that reuses prefixes and in the file's. About 12 minutes and 6 GB of
disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg

from benchmarks.batch_lines import documents, write_lines
from benchmarks.paired import PAIRS, Ratio, by_turns, keep_run, made_with
from benchmarks.rows import Row, at_least, at_most, bold
from benchmarks.submit_files import MODEL, fill_results, write_files
from store.database import Database
from store.schema import migrate
from tests.support.own_services import OwnPostgres, server_folder

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = "`make bench-submit`"
STORES, FETCHES = ("submit", "write_row", "binary blocks"), ("download", "copy out")
ORDERS = ("ordered", "as filed")
DOCUMENTS = 20_000
NAMES = {
    "write_row": "plain psycopg COPY (write_row) of the same rows",
    "binary blocks": "COPY of ready-made binary blocks",
    "copy out": "one COPY of the same custom_ids and responses",
}
BARE_TABLE = (
    "CREATE TABLE bare_jobs (batch_id uuid NOT NULL, seq integer NOT NULL, custom_id text NOT NULL, "
    "body text NOT NULL, PRIMARY KEY (batch_id, seq))"
)
PEAK_MB, COST, TO_COPY = 200.0, 1.1, 0.5

Runs = dict[str, list[dict[str, float]]]


def main() -> None:
    """Run the measurement, print its table, and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    wishes = parser.parse_args()
    sizes, pairs = sorted(wishes.sizes), wishes.pairs
    with (
        tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder,
        server_folder() as servers,
        OwnPostgres(servers / "postgres") as server,
        database_at(server.url.rpartition("/")[0]) as url,
    ):
        files = {size: write_files(Path(folder) / str(size), size) for size in sizes}
        _turn(url, [], "submit", files[sizes[0]]["submit"], sizes[0])  # warms the server and the page cache
        stores = _taken(url, {size: {kind: files[size][kind] for kind in STORES} for size in files}, pairs)
        about_documents = documents(sizes[-1], model=MODEL, about=DOCUMENTS)
        scattered = write_lines(Path(folder) / "documents", about_documents)
        orders = _taken(url, {sizes[-1]: dict.fromkeys(ORDERS, scattered)}, pairs)
        outputs = _filled(url, Path(folder), files)
        fetches = _taken(url, {size: dict.fromkeys(FETCHES, path) for size, path in outputs.items()}, pairs)
        report = summary(
            url,
            {size: stores[size] | fetches[size] | orders.get(size, {}) for size in files},
            file_bytes={size: files[size]["submit"].stat().st_size for size in files},
        )
    show(report)
    keep_run("submit", report, parser, wishes)


@contextmanager
def database_at(server: str) -> Iterator[str]:
    """The address of a migrated database that ends with the block."""
    name = f"stoker_bench_{uuid4().hex[:8]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            database = Database(f"{server}/{name}")
            migrate(database)
            database.close()
            with psycopg.connect(f"{server}/{name}") as connection:
                connection.execute(BARE_TABLE)
            yield f"{server}/{name}"
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def summary(url: str, runs: dict[int, Runs], *, file_bytes: dict[int, int]) -> dict[str, Any]:
    """Every run, what they say of each size, and the rows of the table."""
    with psycopg.connect(url) as connection:
        server = {
            name: connection.execute(f"SHOW {name}").fetchone()
            for name in ("server_version", "fsync", "synchronous_commit", "shared_buffers", "max_wal_size")
        }
    return {
        "made_with": made_with("psycopg", "msgspec", "sqlalchemy"),
        "postgres": {name: row[0] if row else None for name, row in server.items()},
        "file_bytes": file_bytes,
        "us_a_row": {size: {kind: _us_a_row(found[kind], size) for kind in found} for size, found in runs.items()},
        "peak_mb": {
            size: {kind: round(_most(found[kind], "peak_mb")) for kind in found} for size, found in runs.items()
        },
        "runs": runs,
        "table": [row.as_json() for row in rows(runs)],
    }


def rows(runs: dict[int, Runs]) -> list[Row]:
    """The largest size against COPY, then what a job costs there against the smallest."""
    smallest, largest = min(runs), max(runs)
    most = runs[largest]
    found = []
    for kind in ("write_row", "binary blocks"):
        ratio = _ratio(most, kind, "submit")
        target = at_least(ratio, TO_COPY) if kind == "write_row" else {}
        figures = f"{bold(ratio)}; {_rows_a_second(most['submit'], largest)}"
        found.append(
            Row(f"submit of {largest:,} lines ÷ {NAMES[kind]}", figures, COMMAND, headline=bool(target), **target)
        )
    ratio = _ratio(most, "copy out", "download")
    figures = f"{bold(ratio)}; {_rows_a_second(most['download'], largest)}"
    found.append(Row(f"download of {largest:,} results ÷ {NAMES['copy out']}", figures, COMMAND))
    for kind in ("submit", "download"):
        peaks = ", ".join(f"{_most(runs[size][kind], 'peak_mb'):.0f}" for size in runs)
        peak = _most(most[kind], "peak_mb")
        figure = f"{kind} of {_sizes(runs)} lines: most memory of its process, MB"
        found.append(Row(figure, f"**{peaks}**", COMMAND, headline=True, **at_most(peak, PEAK_MB, " MB")))
    figures = f"{bold(_ratio(most, 'as filed', 'ordered'))}; {_rows_a_second(most['ordered'], largest)}, "
    figures += f"{_most(most['ordered'], 'peak_mb'):.0f} MB at most"
    figure = (
        f"submit of {largest:,} lines of 1 KB about {DOCUMENTS:,} documents, scattered: ordered by prefix ÷ as filed"
    )
    found.append(Row(figure, figures, COMMAND, **at_most(_most(most["ordered"], "peak_mb"), PEAK_MB, " MB")))
    if smallest == largest:
        return found
    for kind in ("submit", "download"):
        cost, wall = (_cost(runs, kind, clock=clock) for clock in ("seconds", "wall_s"))
        each = ", ".join(f"{_us_a_row(runs[size][kind], size)['seconds']:.1f}" for size in runs)
        found.append(
            Row(
                f"{kind}: cost of a job at {largest:,} lines ÷ at {smallest:,}; with the process's start",
                f"{bold(cost)}; {wall}; {each} µs a job at {_sizes(runs)}",
                COMMAND,
                headline=kind == "submit",
                **at_most(cost.median, COST),
            )
        )
    return found


def show(report: dict[str, Any]) -> None:
    """A line for every side at every size, then the rows of the table."""
    made = report["made_with"]
    print(f"{made['cpu']}, {made['cores']} cores; commit {made['commit']}, {made['date']}")
    print(f"{'lines':>9} {'':14} {'rows/s':>9} {'least to most':>20} {'µs a row':>9} {'with start':>10} {'peak MB':>8}")
    for size, found in report["runs"].items():
        for kind, runs in found.items():
            speeds = [size / run["seconds"] for run in runs]
            us = report["us_a_row"][size][kind]
            print(
                f"{size:9,} {kind:14} {statistics.median(speeds):9,.0f} "
                f"{f'{min(speeds):,.0f} to {max(speeds):,.0f}':>20} {us['seconds']:9.2f} {us['wall_s']:10.2f} "
                f"{report['peak_mb'][size][kind]:8}"
            )
    for row in report["table"]:
        print(f"{row['figure']}: {row['measured']} {Row(**row).verdict}".replace("**", ""))


def _taken(url: str, sides: dict[int, dict[str, Path]], pairs: int) -> dict[int, Runs]:
    """Every side at every size by turns."""
    runs: dict[int, Runs] = {size: {kind: [] for kind in sides[size]} for size in sides}
    by_turns(
        {
            f"{kind} {size}": partial(_turn, url, runs[size][kind], kind, path, size)
            for size, kinds in sides.items()
            for kind, path in kinds.items()
        },
        pairs=pairs,
    )
    return runs


def _turn(url: str, runs: list[dict[str, float]], kind: str, path: Path, size: int) -> float:
    if kind not in FETCHES:
        _emptied(url)
    runs.append(_run(kind, url, path))
    print(f"{size:,} lines: {kind} {runs[-1]['seconds']:.2f} s", file=sys.stderr)
    return runs[-1]["seconds"]


def _emptied(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE batches, jobs, shards, bare_jobs CASCADE")
        connection.execute("CHECKPOINT")


def _filled(url: str, folder: Path, files: dict[int, dict[str, Path]]) -> dict[int, Path]:
    """A batch of every size, all side by side with their results; the files that their downloads are to write."""
    _emptied(url)
    outputs = {}
    for size in files:
        _run("submit", url, files[size]["submit"])
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT id FROM batches ORDER BY id DESC LIMIT 1").fetchone()
        assert row is not None
        batch_id: UUID = row[0]
        fill_results(url, batch_id)
        outputs[size] = folder / f"{batch_id}.jsonl"
    return outputs


def _run(kind: str, url: str, file: Path) -> dict[str, float]:
    """Seconds of the work, of the whole process, CPU seconds and peak memory of the process that did it."""
    command = [sys.executable, "-m", "benchmarks.submit_sides", kind, url, str(file)]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert child.stdout is not None
    output = child.stdout.read()
    child.stdout.close()
    _, status, used = os.wait4(child.pid, 0)
    wall_s = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{kind} ended with {child.returncode}")
    return {**json.loads(output), "wall_s": wall_s, "cpu_s": used.ru_utime + used.ru_stime}


def _ratio(found: Runs, above: str, below: str) -> Ratio:
    """Of speeds: how fast `below` is, in parts of `above`."""
    return Ratio.of([run["seconds"] for run in found[above]], [run["seconds"] for run in found[below]])


def _cost(runs: dict[int, Runs], kind: str, *, clock: str) -> Ratio:
    """A row's cost at the largest size ÷ at the smallest, of the turns that both had."""
    smallest, largest = min(runs), max(runs)
    large = [run[clock] / largest for run in runs[largest][kind]]
    small = [run[clock] / smallest for run in runs[smallest][kind]]
    return Ratio.of(large, small)


def _us_a_row(runs: list[dict[str, float]], size: int) -> dict[str, float]:
    return {
        clock: round(statistics.median(run[clock] for run in runs) / size * 1e6, 3)
        for clock in ("seconds", "wall_s", "cpu_s")
    }


def _most(runs: list[dict[str, float]], name: str) -> float:
    return max(run[name] for run in runs)


def _rows_a_second(runs: list[dict[str, float]], size: int) -> str:
    return f"{size / statistics.median(run['seconds'] for run in runs):,.0f} rows/s"


def _sizes(runs: dict[int, Runs]) -> str:
    return ", ".join(f"{size:,}" for size in runs)


if __name__ == "__main__":
    main()
