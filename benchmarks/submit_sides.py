"""What benchmarks/submit.py sets against each other, each in a process of its own:

    python -m benchmarks.submit_sides KIND DATABASE FILE

prints its seconds, after imports, and the most memory that it held. A submit hashes the file, validates every line,
looks for duplicates, and stores jobs and shards; a download joins results with their jobs into the contract's lines.
They are set against COPYs that do nothing but store or fetch. All stores commit every 50,000 rows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from uuid import UUID, uuid4

import psycopg

ROWS_A_TRANSACTION = 50_000
COPY = "COPY bare_jobs (batch_id, seq, custom_id, body) FROM STDIN"


def submit(database: str, file: Path, *, order: str = "prefix") -> float:
    """Seconds of one `submit_file`."""
    from models.lines import SubmitOptions  # noqa: PLC0415  # the bare children must not load it
    from models.states import JobOrder  # noqa: PLC0415
    from pipeline.serving import ServedModels  # noqa: PLC0415
    from pipeline.submit import Wishes, submit_file  # noqa: PLC0415
    from runtime.settings import Settings  # noqa: PLC0415
    from store.database import Database  # noqa: PLC0415

    options, served = SubmitOptions(max_output_tokens=256), ServedModels(frozenset({"smollm2-135m"}))
    connections, settings, wishes = Database(database), Settings(), Wishes(order=JobOrder(order))
    start = time.perf_counter()
    submit_file(connections, file, options=options, settings=settings, served_models=served, reuse=True, wishes=wishes)
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


def download(database: str, file: Path) -> float:
    """Seconds of what `stoker results -o` does with the batch that the file is named for."""
    from pipeline.export import write_lines  # noqa: PLC0415  # as above
    from store.database import Database  # noqa: PLC0415

    connections = Database(database)
    start = time.perf_counter()
    with file.open("wb") as output:
        write_lines(connections, UUID(file.stem), output=output, errors=None)
    return time.perf_counter() - start


def copy_out(database: str, file: Path) -> float:
    """Seconds of one COPY of the same custom_ids and responses into a file."""
    query = (
        "COPY (SELECT j.custom_id, r.response FROM results r JOIN jobs j USING (batch_id, seq) "
        "WHERE batch_id = %s ORDER BY seq) TO STDOUT"
    )
    with psycopg.connect(database) as connection, file.open("wb") as output:
        start = time.perf_counter()
        with connection.cursor().copy(query, (UUID(file.stem),)) as copy:
            for block in copy:
                output.write(block)
        return time.perf_counter() - start


SIDES: dict[str, Callable[[str, Path], float]] = {
    "submit": submit,
    "ordered": submit,
    "as filed": partial(submit, order="file"),
    "write_row": write_rows,
    "binary blocks": write_blocks,
    "download": download,
    "copy out": copy_out,
}


def _rest(first: list[tuple[int, str]], rows: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield from first
    yield from islice(rows, ROWS_A_TRANSACTION - 1)


def _peak_mb() -> float:
    """The most memory this process held; not ru_maxrss, in which a child begins with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    kind, database, file = sys.argv[1:]
    print(json.dumps({"seconds": SIDES[kind](database, Path(file)), "peak_mb": _peak_mb()}))
