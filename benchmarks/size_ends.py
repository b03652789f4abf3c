"""How the rows of benchmarks/size.py leave: by download, by a dump and its restore, by retention.

Waiting 30 days is out of question: `aged` sets back when a batch ended, and when it went out of sight.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg

from benchmarks.large_table import peak_of
from benchmarks.size_postgres import counters, programs
from runtime.clock import utc_now
from runtime.settings import Settings
from store.database import Database
from store.retention import UNSEEN_S, delete_past_retention, drop_partition, droppable_partitions, mark_deleted

RETENTION_S: Final = 30 * 86_400.0
DELETE_S: Final = 180.0  # the DELETEs are measured for so long at most
DUMP_JOBS: Final = "2"
RESTORED: Final = "stoker_restored"
_ROWS = "SELECT coalesce(sum(n_tup_del), 0) FROM pg_stat_user_tables WHERE relname ~ '^(jobs|results)_'"


def download(settings: Settings, batch: UUID, folder: Path, *, rows: int) -> dict[str, Any]:
    """`stoker results BATCH -o FILE` as a process of its own: seconds, rows/s, memory."""
    output = folder / f"{batch}.jsonl"
    command = [sys.executable, "-m", "benchmarks.submit_sides", "download", settings.require_postgres(), str(output)]
    began, peak_mb = time.monotonic(), 0.0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        peak_mb = max(peak_mb, peak_of(child.pid))
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if child.returncode:
        raise SystemExit(f"the download ended with {child.returncode}")
    size = output.stat().st_size
    output.unlink()
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds),
        "peak_mb": round(peak_mb, 1),
        "bytes": size,
    }


def dump(settings: Settings, folder: Path) -> dict[str, Any]:
    """pg_dump in the directory format, compressed: seconds and bytes."""
    target = folder / "dump"
    began = time.monotonic()
    arguments = ["-Fd", "-j", DUMP_JOBS, "-Z", "gzip:1", "-f", str(target), settings.require_postgres()]
    subprocess.run([str(programs() / "pg_dump"), *arguments], check=True)
    size = sum(path.stat().st_size for path in target.iterdir())
    return {"options": " ".join(arguments[:5]), "seconds": round(time.monotonic() - began, 1), "bytes": size}


def restore(settings: Settings, folder: Path, *, rows: int) -> dict[str, Any]:
    """pg_restore of that dump into another database of the same server: seconds; the dump and the database go.

    Ends the program if not so many jobs and results are there.
    """
    url = settings.require_postgres()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {RESTORED}")
        before = counters(connection)["wal_bytes"]
        began = time.monotonic()
        target = f"{url.rpartition('/')[0]}/{RESTORED}"
        subprocess.run(
            [str(programs() / "pg_restore"), "-j", DUMP_JOBS, "-d", target, str(folder / "dump")], check=True
        )
        seconds = time.monotonic() - began
        written = counters(connection)["wal_bytes"] - before
        with psycopg.connect(target) as restored:
            counts = restored.execute("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM results)").fetchone()
        connection.execute(f"DROP DATABASE {RESTORED} WITH (FORCE)")
    shutil.rmtree(folder / "dump")
    jobs, results = counts or (0, 0)
    if (jobs, results) != (rows, rows):
        raise SystemExit(f"{jobs} jobs and {results} results were restored, of {rows} each")
    return {"seconds": round(seconds, 1), "wal_bytes": written, "jobs": jobs, "results": results}


def by_partition(settings: Settings, batch: UUID) -> dict[str, Any]:
    """A past week's rows, dropped as the leader does it; then the rest of its batch, deleted in slices.

    Ends the program if that was not one partition of jobs and one of results.
    """
    with psycopg.connect(settings.require_postgres(), autocommit=True) as connection:
        database = Database(settings.require_postgres(), pool_size=1)
        aged(connection, database, batch)
        before, began = counters(connection), time.monotonic()
        with database.transaction() as session:
            names = droppable_partitions(session, now=utc_now())
        if sorted(name.partition("_")[0] for name in names) != ["jobs", "results"]:
            raise SystemExit(f"not one week's jobs and results may be dropped, but {names}")
        looked_s = time.monotonic() - began
        rows = sum(_one(connection, f"SELECT count(*) FROM {name}") for name in names)
        began = time.monotonic() - looked_s
        dropped = []
        for name in names:
            with database.transaction() as session:
                if drop_partition(session, name):
                    dropped.append(name)
        drop_s = time.monotonic() - began
        if dropped != names:
            raise SystemExit(f"of {names} only {dropped} were dropped")
        after = counters(connection)
        calls = 0
        while delete_past_retention(database, retention_s=RETENTION_S):
            calls += 1
        rest_s = time.monotonic() - began - drop_s
        database.close()
        return {
            "partitions": dropped,
            "rows": rows,
            "seconds": round(drop_s, 3),
            "bytes_freed": before["database_bytes"] - after["database_bytes"],
            "wal_bytes": after["wal_bytes"] - before["wal_bytes"],
            "rest_s": round(rest_s, 2),
            "rest_calls": calls,
        }


def by_delete(settings: Settings, batch: UUID) -> dict[str, Any]:
    """Rows of this week's batch, deleted as the leader does it in slices, without its pauses; then a VACUUM of them."""
    with psycopg.connect(settings.require_postgres(), autocommit=True) as connection:
        database = Database(settings.require_postgres(), pool_size=1)
        aged(connection, database, batch)
        before, rows_before = counters(connection), _one(connection, _ROWS)
        began = time.monotonic()
        is_more = True
        while is_more and time.monotonic() - began < DELETE_S:
            is_more = delete_past_retention(database, retention_s=RETENTION_S)
        seconds = time.monotonic() - began
        database.close()
        time.sleep(1.5)  # a backend reports what it did at most once a second
        rows, after = _one(connection, _ROWS) - rows_before, counters(connection)
        began = time.monotonic()
        connection.execute("VACUUM jobs, results, shards")
        vacuum_s = time.monotonic() - began
        last = counters(connection)
        return {
            "rows": rows,
            "seconds": round(seconds, 1),
            "rows_per_s": round(rows / seconds),
            "is_all": not is_more,
            "wal_bytes": after["wal_bytes"] - before["wal_bytes"],
            "vacuum_s": round(vacuum_s, 1),
            "bytes_freed": before["database_bytes"] - last["database_bytes"],
        }


def aged(connection: psycopg.Connection, database: Database, batch: UUID) -> None:
    """As if the batch had ended before the retention, and gone out of sight before the last readers ended."""
    connection.execute(
        "UPDATE batches SET ended_at = ended_at - make_interval(secs => %s) WHERE id = %s", (RETENTION_S + 60, batch)
    )
    with database.transaction() as session:
        assert mark_deleted(session, retention_s=RETENTION_S) == 1
    connection.execute(
        "UPDATE batches SET deleted_at = deleted_at - make_interval(secs => %s) WHERE id = %s", (UNSEEN_S + 1, batch)
    )


def free_bytes(folder: Path) -> int:
    """Room on the disk of this folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _one(connection: psycopg.Connection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
