"""One measurement of our own pipeline: a real worker, one batch that was submitted before the clock, CPU by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.cores import processes, tree_cpu_s
from benchmarks.own_batch import ended, stored
from benchmarks.place import as_submitted
from runtime.settings import Settings
from scripts.local import local_worker
from scripts.shown_batch import seconds_of
from store.database import Database

POLL_S = 0.25
OUTSIDE = ("submit", "worker", "worker parent", "worker children", "dispatcher", "postgres", "rabbitmq", "redis")


@dataclass(frozen=True, slots=True)
class Leg:
    """Jobs a second, and CPU microseconds a job by stage."""

    jobs: int
    seconds: float
    jobs_per_s: float
    cpu_us: dict[str, float]

    @classmethod
    def of(cls, jobs: int, seconds: float, cpu_s: dict[str, float]) -> Leg:
        """From what was measured; `cpu_s` by stage."""
        return cls(
            jobs, round(seconds, 3), round(jobs / seconds, 1), {k: round(v / jobs * 1e6, 1) for k, v in cpu_s.items()}
        )

    @property
    def outside_us(self) -> float:
        """CPU microseconds a job of everything but the endpoint."""
        return sum(spent for name, spent in self.cpu_us.items() if name in OUTSIDE)

    def as_json(self) -> dict[str, Any]:
        """Also with the sum."""
        return {**asdict(self), "cpu_us_outside": round(self.outside_us, 1)}


def run_ours(
    settings: Settings,
    file: Path,
    servers: dict[str, int],
    *,
    warm_up: Path,
    endpoint_pid: int,
    meanwhile: Callable[[int], None] | None = None,
) -> Leg:
    """A worker with these settings takes one batch; one before it, unmeasured, opens its connections.

    `meanwhile` gets the pid of one of its children while the batch runs.
    """
    database = Database(settings.require_postgres())
    try:
        with local_worker(settings) as worker:
            pid = worker.process.pid
            ended(database, stored(database, warm_up, settings), poll_s=POLL_S)
            checkpoint(settings)
            cut = as_submitted(settings)
            before = cpu_s_of(pid, servers, endpoint_pid)
            submit_s = time.process_time()
            batch_id = stored(database, file, cut)
            submit_s = time.process_time() - submit_s
            if meanwhile is not None:
                meanwhile(children_of(pid)[0])
            progress = ended(database, batch_id, poll_s=POLL_S)
            after = cpu_s_of(pid, servers, endpoint_pid)
    finally:
        database.close()
    answered = progress.succeeded + progress.truncated  # cut where a length is fixed
    if answered != progress.total:
        raise SystemExit(f"{answered} of {progress.total} jobs were answered; {progress.failed} failed")
    spent = {name: after[name] - before[name] for name in after}
    return Leg.of(progress.total, seconds_of(progress), {"submit": submit_s, **spent})


def server_cpu_s(servers: dict[str, int], endpoint_pid: int) -> dict[str, float]:
    """CPU seconds of the servers with all that they started, those that have ended included, and of the endpoint."""
    everyone = processes()
    return {name: tree_cpu_s(pid, everyone) for name, pid in {**servers, "endpoint": endpoint_pid}.items()}


def children_of(worker: int) -> list[int]:
    """The pids of a worker's pool processes."""
    found = (process for process in processes().values() if process.parent == worker)
    return sorted(process.pid for process in found if "worker.dispatcher" not in process.command)


def cpu_s_of(worker: int, servers: dict[str, int], endpoint_pid: int) -> dict[str, float]:
    """CPU seconds by stage: the worker's parent, its children, the dispatcher, and the servers."""
    everyone = processes()
    below = [process for process in everyone.values() if process.parent == worker]
    dispatchers = [process.pid for process in below if "worker.dispatcher" in process.command]
    return {
        "worker parent": everyone[worker].own_s,
        "worker children": sum(tree_cpu_s(p.pid, everyone) for p in below if p.pid not in dispatchers),
        "dispatcher": sum(tree_cpu_s(pid, everyone) for pid in dispatchers),
        **server_cpu_s(servers, endpoint_pid),
    }


def checkpoint(settings: Settings) -> None:
    """What was written before is on disk, so that no leg pays for another's."""
    with psycopg.connect(settings.require_postgres(), autocommit=True) as connection:
        connection.execute("CHECKPOINT")
