"""What benchmarks/size.py looks at while jobs run and when they have ended: CPU, the leader, shards, questions.

The questions are the product's own functions, on the tables as large as they are then.
"""

from __future__ import annotations

import os
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
from sqlalchemy import text

from benchmarks.cores import processes, tree
from benchmarks.legs import cpu_s_of
from benchmarks.own_batch import TENANT
from benchmarks.place import Place
from benchmarks.size_postgres import connections, totals
from scripts.local import LocalProcess
from scripts.metrics_places import with_metrics_of
from store.batches import batch_progress, latest_batches
from store.database import Database, Session
from store.inspection import Wanted, course_of, engines_seen, failures_of, jobs_page, whole_job
from tests.support.waiting import wait_until

TIMES: Final = 5
PAGE: Final = 100
METRICS_S: Final = 60.0
WHILE_RUNNING: Final = ("the view `backlog`", "`stoker status`", "a page of jobs, from the middle")
_DONE = "SELECT coalesce(sum(n_tup_ins), 0) FROM pg_stat_user_tables WHERE relname LIKE 'results_%'"
_SHARDS = """
SELECT n_tup_upd AS updated, n_tup_hot_upd AS hot_updated, n_dead_tup AS dead, autovacuum_count AS autovacuums,
    pg_relation_size(relid) AS heap_bytes, pg_indexes_size(relid) AS index_bytes
FROM pg_stat_user_tables WHERE relname = 'shards'"""


@dataclass(frozen=True, slots=True)
class Asked:
    """Milliseconds of a question: the median and the most of some times."""

    median_ms: float
    most_ms: float


class Sampler:
    """Samples of one run: `take` as often as wanted."""

    def __init__(
        self,
        place: Place,
        worker: LocalProcess,
        endpoint_pid: int,
        connection: psycopg.Connection,
        batch: UUID,
        jobs: int,
    ) -> None:
        self._place, self._worker, self._endpoint_pid = place, worker.process.pid, endpoint_pid
        self._connection = connection
        self._database = Database(place.settings.require_postgres(), pool_size=1)
        self._asked = {name: ask for name, ask in questions(batch, jobs).items() if name in WHILE_RUNNING}
        wait_until(lambda: sweep_seconds(place)[0] > 0, METRICS_S, "the leader's first sweep")
        self._began = time.monotonic()
        self.taken: list[dict[str, Any]] = []

    def take(self) -> dict[str, Any]:
        """Jobs done, CPU seconds, the leader's sweeps, the shards' table and some questions, now."""
        at_s = time.monotonic() - self._began
        cpu_s = cpu_s_of(self._worker, self._place.servers, self._endpoint_pid)
        sweeps, sweep_s = sweep_seconds(self._place)
        shards = self._connection.execute(_SHARDS).fetchone() or ()
        names = ("updated", "hot_updated", "dead", "autovacuums", "heap_bytes", "index_bytes")
        self.taken.append(
            {
                "at_s": round(at_s, 1),
                "done": self.done(),
                "load": round(os.getloadavg()[0], 2),
                "cpu_s": {name: round(spent, 2) for name, spent in cpu_s.items()},
                "memory_mb": {
                    "worker": memory_mb(self._worker),
                    **{name: memory_mb(pid) for name, pid in self._place.servers.items() if name != "postgres"},
                },
                "sweeps": sweeps,
                "sweep_s": round(sweep_s, 3),
                "shards": dict(zip(names, shards, strict=True)),
                "connections": connections(self._connection),
                "statements": totals(self._connection),
                "ms": {name: once(self._database, ask) for name, ask in self._asked.items()},
            }
        )
        return self.taken[-1]

    def done(self) -> int:
        """Results that were stored since the server began to count; some of the last second's may lack."""
        row = self._connection.execute(_DONE).fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Close its connections."""
        self._database.close()


def questions(batch: UUID, jobs: int) -> dict[str, Callable[[Session], object]]:
    """What users, the page and autoscalers ask, of a batch of so many jobs."""
    middle = jobs // 2
    return {
        "the view `backlog`": lambda session: session.execute(text("SELECT * FROM backlog")).all(),
        "`stoker status`": lambda session: batch_progress(session, batch, tenant=TENANT),
        "the list of batches": lambda session: latest_batches(session, tenant=TENANT, limit=20),
        "a page of jobs, from the middle": lambda session: jobs_page(
            session, batch, tenant=TENANT, first=middle, limit=PAGE
        ),
        "a page of failed jobs": lambda session: jobs_page(
            session, batch, tenant=TENANT, first=0, limit=PAGE, wanted=Wanted.FAILED
        ),
        "a page of unfinished jobs": lambda session: jobs_page(
            session, batch, tenant=TENANT, first=0, limit=PAGE, wanted=Wanted.WAITING
        ),
        "one job": lambda session: whole_job(session, batch, middle, tenant=TENANT),
        "kinds of failures": lambda session: failures_of(session, batch, tenant=TENANT),
        "results over time": lambda session: course_of(session, batch, tenant=TENANT),
        "engines seen": lambda session: engines_seen(session, batch, tenant=TENANT),
    }


def asked(database: Database, batch: UUID, jobs: int) -> dict[str, Asked]:
    """Every question, some times each."""
    found = {}
    for name, ask in questions(batch, jobs).items():
        took = [once(database, ask) for _ in range(TIMES)]
        found[name] = Asked(round(statistics.median(took), 1), round(max(took), 1))
    return found


def once(database: Database, ask: Callable[[Session], object]) -> float:
    """Milliseconds of one question in a transaction of its own."""
    began = time.monotonic()
    with database.transaction() as session:
        ask(session)
    return round((time.monotonic() - began) * 1000, 1)


def sweep_seconds(place: Place) -> tuple[int, float]:
    """(the leader's sweeps so far, seconds of all of them), as its worker's /metrics says."""
    port = with_metrics_of(place.settings, "generation").metrics.port
    try:
        said = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except urllib.error.URLError:  # the worker has announced itself, and does not answer yet
        return 0, 0.0
    name = "stoker_dispatch_sweep_seconds"
    figures = dict(line.rsplit(" ", 1) for line in said.splitlines() if line.startswith(name))
    of = {
        kind: sum(float(value) for key, value in figures.items() if key.startswith(f"{name}_{kind}"))
        for kind in ("count", "sum")
    }
    return int(of["count"]), of["sum"]


def memory_mb(root: int) -> float:
    """Memory that a process and its descendants hold alone, and their part of what they share."""
    total_kb = 0
    for process in tree(root, processes()):
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended meanwhile
            continue
        total_kb += int(rollup.partition("\nPss:")[2].split()[0])
    return round(total_kb / 1024, 1)
