"""A table of growing size through `stoker submit --prompt` and `stoker results -o`: memory and rows/s of each command.

    python -m benchmarks.large_table [--sizes 1000000 10000000] [--run 100000]

The rows become a batch; a worker on an endpoint that answers at once runs the first of them; then the whole table is
written with the answers that there are, the other rows as unfinished. Each command is a process of its own, whose peak
memory the kernel says. Services are embedded ones in a folder of their own. About 10 minutes and 20 GB of disk.
Writes benchmarks/results/large_table.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.paired import keep_run, made_with
from benchmarks.rows import Row
from benchmarks.static_endpoint import CONTENT, MODEL, StaticEndpoint
from runtime.settings import Settings, environment_of, load_settings
from scripts.local import local_services, local_worker, prepare_schema
from tests.support.own_services import server_folder

COMMAND: Final = "`make bench-tables`"
STOKER: Final = Path(sys.executable).with_name("stoker")
PROMPT: Final = "Which of our teams should answer this customer? Message {id}: {text}"
GROUP_ROWS: Final = 1_000_000  # one row group: larger than most writers make them
WRITE_ROWS: Final = 100_000
RUN_LIMIT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A command: how long it took, and the most memory that its process had."""

    seconds: float
    peak_mb: float
    stdout: str


@dataclass(frozen=True, slots=True)
class Size:
    """One table of `rows` rows: what was asked of it."""

    rows: int
    file_bytes: int
    submit_s: float
    submit_mb: float
    ran: int
    run_s: float
    results_s: float
    results_mb: float
    answered: int
    output_bytes: int


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--run", type=int, default=100_000, help="rows that are to have an answer before it is written")
    wishes = parser.parse_args()
    found = []
    with server_folder() as folder, StaticEndpoint(core=None) as endpoint:
        given = load_settings()
        engine = given.engine.model_copy(update={"url": endpoint.url})
        fresh = given.model_copy(update={"engine": engine, "home": folder / "home"})
        with local_services(fresh) as settings:
            prepare_schema(settings)
            for size in sorted(wishes.sizes):
                found.append(measure(settings, folder, size, to_run=wishes.run))
                print(json.dumps(asdict(found[-1])), flush=True)
    report = {
        "made_with": made_with("pyarrow", "psycopg"),
        "sizes": [asdict(one) for one in found],
        "table": [row.as_json() for row in rows(found)],
    }
    print(json.dumps(report["table"], indent=2))
    keep_run("large_table", report, parser, wishes)


def measure(settings: Settings, folder: Path, size: int, *, to_run: int) -> Size:
    """One size: submit it, run some, write all."""
    table, output = folder / f"{size}.parquet", folder / f"{size}.out.parquet"
    write_table(table, size)
    stored = ended(settings, "submit", table, "--prompt", PROMPT, "--model", MODEL, "--force")
    batch = stored.stdout.strip()
    begun = time.monotonic()
    with local_worker(settings):
        ran = await_done(settings, batch, at_least=to_run)
    run_s = time.monotonic() - begun
    written = ended(settings, "results", batch, "-o", output)
    read = pq.read_table(output, columns=["answer"]).column("answer")
    answered = size - read.null_count
    if read.length() != size or answered < to_run or read.drop_null()[0].as_py() != CONTENT:
        raise SystemExit(f"{output}: {read.length()} rows, {answered} answers")
    found = Size(
        rows=size,
        file_bytes=table.stat().st_size,
        submit_s=round(stored.seconds, 1),
        submit_mb=round(stored.peak_mb, 1),
        ran=ran,
        run_s=round(run_s, 1),
        results_s=round(written.seconds, 1),
        results_mb=round(written.peak_mb, 1),
        answered=answered,
        output_bytes=output.stat().st_size,
    )
    ended(settings, "cancel", batch)
    table.unlink()
    output.unlink()
    return found


def write_table(path: Path, size: int) -> None:
    """Rows with a number and a message of some 60 characters, no two alike."""
    types: dict[str, pa.DataType] = {"id": pa.int64(), "text": pa.string(), "stars": pa.int8()}
    schema = pa.schema(types)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, size, GROUP_ROWS):
            numbers = range(first, min(first + GROUP_ROWS, size))
            parts = [
                pa.record_batch(
                    [
                        pa.array(part, pa.int64()),
                        pa.array(
                            [f"my parcel {n * 7919 % 100_003} has been {n % 13} days late, order {n}" for n in part]
                        ),
                        pa.array([n % 5 for n in part], pa.int8()),
                    ],
                    schema=schema,
                )
                for part in (numbers[at : at + WRITE_ROWS] for at in range(0, len(numbers), WRITE_ROWS))
            ]
            writer.write_table(pa.Table.from_batches(parts), row_group_size=GROUP_ROWS)


def ended(settings: Settings, *arguments: str | Path) -> Ended:
    """`stoker …` to its end."""
    env = {**os.environ, **environment_of(settings)}
    begun, peak_mb = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen([str(STOKER), *map(str, arguments)], env=env, stdout=said)
        while child.poll() is None:
            peak_mb = max(peak_mb, peak_of(child.pid))
            time.sleep(0.02)
        said.seek(0)
        if child.returncode:
            raise SystemExit(f"stoker {arguments[0]} ended with status {child.returncode}")
        return Ended(time.monotonic() - begun, peak_mb, said.read())


def peak_of(pid: int) -> float:
    """The most memory that a process has had, MB; not ru_maxrss, in which a child begins with its parent's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0.0
    return int((status.partition("VmHWM:")[2].split() or ["0"])[0]) / 1024


def await_done(settings: Settings, batch: str, *, at_least: int) -> int:
    """Wait until so many jobs have their result: how many have."""
    end = time.monotonic() + RUN_LIMIT_S
    while time.monotonic() < end:
        done: int = json.loads(ended(settings, "status", batch, "--json").stdout)["done"]
        if done >= at_least:
            return done
        time.sleep(1.0)
    raise SystemExit(f"{batch}: fewer than {at_least} jobs in {RUN_LIMIT_S:.0f} s")


def rows(found: list[Size]) -> list[Row]:
    """Memory and speed of both commands at each size."""
    sizes, largest = ", ".join(f"{one.rows:,}" for one in found), found[-1]
    return [
        Row(
            f"`stoker {what}` of a table of {sizes} rows: most memory of its process, MB",
            f"**{', '.join(f'{peak:.0f}' for peak in peaks)}**; {largest.rows / seconds:,.0f} rows/s{more}",
            COMMAND,
            headline=True,
        )
        for what, peaks, seconds, more in (
            ("submit --prompt", [one.submit_mb for one in found], largest.submit_s, ""),
            (
                "results -o",
                [one.results_mb for one in found],
                largest.results_s,
                f", {largest.answered:,} of them with an answer",
            ),
        )
    ]


if __name__ == "__main__":
    main()
