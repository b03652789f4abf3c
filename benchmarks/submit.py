"""Submit against a bare COPY of the same rows: `python -m benchmarks.submit --lines 1000000`.

A submit hashes the file, validates every line, looks for duplicates, and stores jobs and shards. It is set
against two COPYs that do nothing but store: psycopg's `write_row` as its manual shows it, and ready-made
binary blocks, the most that the server takes. All commit every 50,000 rows, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "submit.json"
SERVER = "postgresql://postgres@127.0.0.1:5432"
ENDPOINT = "/v1/chat/completions"
ROWS_A_TRANSACTION = 50_000
BLOCK_BYTES = 256 * 1024
COPY = "COPY bare_jobs (batch_id, seq, custom_id, body) FROM STDIN"
BINARY_START, BINARY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
BARE_TABLE = (
    "CREATE TABLE bare_jobs (batch_id uuid NOT NULL, seq integer NOT NULL, custom_id text NOT NULL, "
    "body text NOT NULL, PRIMARY KEY (batch_id, seq))"
)
SYSTEM = (
    "You sort the messages of a shop for camping gear. Answer with the name of one queue: billing, shipping, "
    "returns, account, product, safety or other.\nDo not answer the customer."
)
TEXT = (
    'please parcel order invoice tent stove the my was not late broken when "refund" address café return pole it and '
    "sleeping bag account password photo I on Friday to of received 40817 wrong size thanks twice charged"
)


def main() -> None:
    """Run the measurement, print its table, and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--server", default=os.environ.get("STOKER_TEST_POSTGRES") or SERVER)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=3, metavar=("KIND", "DATABASE", "FILE"), help=argparse.SUPPRESS)
    wishes = parser.parse_args()
    if wishes.child:
        kind, database, file = wishes.child
        print(json.dumps({"seconds": CHILDREN[kind](database, Path(file)), "peak_mb": _peak_mb()}))
        return
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder, _database(wishes.server) as url:
        files = _write_files(Path(folder), wishes.lines)
        runs = _run_pairs(url, files, pairs=wishes.pairs)
        result = _summary(url, files, runs, lines=wishes.lines)
    wishes.output.parent.mkdir(parents=True, exist_ok=True)
    wishes.output.write_text(json.dumps(result, indent=2) + "\n")
    _print(result)


def submit(database: str, file: Path) -> float:
    """Seconds of one `submit_file`."""
    from models.lines import SubmitOptions  # noqa: PLC0415  # the bare children must not load it
    from pipeline.submit import submit_file  # noqa: PLC0415
    from runtime.settings import Settings  # noqa: PLC0415
    from store.database import Database  # noqa: PLC0415

    options, served = SubmitOptions(max_output_tokens=256), frozenset({"smollm2-135m"})
    connections, settings = Database(database), Settings()
    start = time.perf_counter()
    submit_file(connections, file, options=options, settings=settings, served_models=served, reuse=True)
    return time.perf_counter() - start


def write_rows(database: str, file: Path) -> float:
    """Seconds of a COPY by `write_row`; `file` has a custom_id, a tab and a body a line."""
    batch_id = uuid4()
    with psycopg.connect(database) as connection, file.open(encoding="utf-8", newline="\n") as lines:
        start = time.perf_counter()
        rows = enumerate(lines)
        while chunk := list(islice(rows, 1)):
            with connection.cursor().copy(COPY) as copy:
                for seq, line in _rest(chunk, rows):
                    custom_id, _, body = line.partition("\t")
                    copy.write_row((batch_id, seq, custom_id, body[:-1]))
            connection.commit()
        return time.perf_counter() - start


def write_blocks(database: str, file: Path) -> float:
    """Seconds of a COPY of ready-made blocks; `file` has a length before each, 0 where a transaction ends."""
    with psycopg.connect(database) as connection, file.open("rb", buffering=1024 * 1024) as blocks:
        start = time.perf_counter()
        while length := blocks.read(4):
            with connection.cursor().copy(f"{COPY} (FORMAT BINARY)") as copy:
                while size := int.from_bytes(length, "big"):
                    copy.write(blocks.read(size))
                    length = blocks.read(4)
            connection.commit()
        return time.perf_counter() - start


CHILDREN: dict[str, Callable[[str, Path], float]] = {
    "submit": submit,
    "write_row": write_rows,
    "binary blocks": write_blocks,
}


def _rest(first: list[tuple[int, str]], rows: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield from first
    yield from islice(rows, ROWS_A_TRANSACTION - 1)


@contextmanager
def _database(server: str) -> Iterator[str]:
    """The address of a migrated database that ends with the block."""
    from store.database import Database  # noqa: PLC0415
    from store.schema import migrate  # noqa: PLC0415

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


def _write_files(folder: Path, lines: int) -> dict[str, Path]:
    """The batch file, and the same rows as each bare COPY wants them."""
    files = {kind: folder / kind.replace(" ", "_") for kind in CHILDREN}
    chance = random.Random(1)
    row_start = struct.pack(">hi16si", 4, 16, uuid4().bytes, 4)
    with (
        files["submit"].open("w") as batch,
        files["write_row"].open("w") as rows,
        files["binary blocks"].open("wb") as blocks,
    ):
        block = bytearray(BINARY_START)
        for seq in range(lines):
            custom_id, body = f"ticket-{seq:08}", _body(chance)
            batch.write(f'{{"custom_id": "{custom_id}", "method": "POST", "url": "{ENDPOINT}", "body": {body}}}\n')
            rows.write(f"{custom_id}\t{body}\n")
            encoded = body.encode()
            block += row_start + struct.pack(">ii", seq, len(custom_id)) + custom_id.encode()
            block += struct.pack(">i", len(encoded)) + encoded
            ends = (seq + 1) % ROWS_A_TRANSACTION == 0 or seq + 1 == lines
            if ends:
                block += BINARY_END
            if ends or len(block) >= BLOCK_BYTES:
                blocks.write(len(block).to_bytes(4, "big") + block + (bytes(4) if ends else b""))
                block = bytearray(BINARY_START if ends else b"")
    return files


def _body(chance: random.Random) -> str:
    question = " ".join(chance.choices(TEXT.split(), k=chance.randint(8, 30)))
    return json.dumps(
        {
            "model": "smollm2-135m",
            "messages": [
                {"role": "system", "content": SYSTEM[: chance.randint(60, len(SYSTEM))]},
                {"role": "user", "content": question},
            ],
            "max_tokens": chance.choice([8, 16, 64]),
            "temperature": 0,
        },
        ensure_ascii=False,
    )


def _run_pairs(url: str, files: dict[str, Path], *, pairs: int) -> dict[str, list[dict[str, float]]]:
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in CHILDREN}
    for pair in range(pairs):
        kinds = list(CHILDREN) if pair % 2 == 0 else list(reversed(CHILDREN))
        for kind in kinds:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("TRUNCATE batches, jobs, shards, bare_jobs CASCADE")
                connection.execute("CHECKPOINT")
            runs[kind].append(_run(kind, url, files[kind]))
            print(f"pair {pair + 1}: {kind} {runs[kind][-1]['seconds']:.2f} s", file=sys.stderr)
    return runs


def _run(kind: str, url: str, file: Path) -> dict[str, float]:
    """Seconds of the work, CPU seconds and peak memory of the process that did it."""
    command = [sys.executable, "-m", "benchmarks.submit", "--child", kind, url, str(file)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert child.stdout is not None
    output = child.stdout.read()
    child.stdout.close()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{kind} ended with {child.returncode}")
    return {**json.loads(output), "cpu_seconds": used.ru_utime + used.ru_stime}


def _summary(
    url: str, files: dict[str, Path], runs: dict[str, list[dict[str, float]]], *, lines: int
) -> dict[str, Any]:
    ratios = {
        kind: sorted(bare["seconds"] / ours["seconds"] for bare, ours in zip(runs[kind], runs["submit"], strict=True))
        for kind in runs
        if kind != "submit"
    }
    with psycopg.connect(url) as connection:
        server = {
            name: connection.execute(f"SHOW {name}").fetchone()
            for name in ("server_version", "fsync", "synchronous_commit", "shared_buffers", "max_wal_size")
        }
    return {
        "benchmark": "submit",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "psycopg": version("psycopg"),
        "msgspec": version("msgspec"),
        "postgres": {name: row[0] if row else None for name, row in server.items()},
        "lines": lines,
        "file_bytes": files["submit"].stat().st_size,
        "ratio": {
            kind: {"median": statistics.median(found), "least": found[0], "most": found[-1]}
            for kind, found in ratios.items()
        },
        "lines_per_second": {kind: lines / statistics.median(run["seconds"] for run in runs[kind]) for kind in runs},
        "peak_mb": {kind: max(run["peak_mb"] for run in runs[kind]) for kind in runs},
        "runs": runs,
    }


def _print(result: dict[str, Any]) -> None:
    runs = result["runs"]
    print(
        f"{result['lines']:,} lines, {result['file_bytes']:,} bytes; {result['cpu']}, {result['cores']} cores; "
        f"commit {result['commit']}, {result['date']}"
    )
    print(f"{'':14} {'seconds':>8} {'lines/s':>9} {'CPU s':>6} {'peak MB':>8}  submit ÷ this (least to most)")
    for kind, speed in result["lines_per_second"].items():
        seconds = statistics.median(run["seconds"] for run in runs[kind])
        cpu = statistics.median(run["cpu_seconds"] for run in runs[kind])
        ratio = result["ratio"].get(kind)
        shown = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else ""
        print(f"{kind:14} {seconds:8.2f} {speed:9,.0f} {cpu:6.2f} {result['peak_mb'][kind]:8.0f}  {shown}")


def _peak_mb() -> float:
    """The most memory this process held; not ru_maxrss, in which a child begins with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
