"""The whole system of one chaos run: own services, four workers with engines of their own, and batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from store.database import Database
from store.schema import migrate
from tests.chaos.journal import Journal
from tests.support.own_services import OwnPostgres, OwnRabbitMQ, OwnRedis, server_folder
from tests.support.processes import (
    MARK,
    REPOSITORY,
    SeenProcess,
    WorkerProcess,
    clean_environment,
    kill_marked,
    new_mark,
    seen_processes,
    stoker,
)
from tests.support.stand_in_engine import install

WORKERS = 4
LEASE_S = 3


@dataclass
class System:
    """What the faults act upon."""

    folder: Path
    postgres: OwnPostgres
    redis: OwnRedis
    rabbitmq: OwnRabbitMQ
    env: dict[str, str]
    journal: Journal
    workers: list[WorkerProcess] = field(default_factory=list)
    dead: list[WorkerProcess] = field(default_factory=list)
    batches: dict[str, list[str]] = field(default_factory=dict)
    """The custom_ids that each must end with."""
    ended_early: set[str] = field(default_factory=set)
    never_visible: set[str] = field(default_factory=set)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    """(what, seconds after kill -9 of a worker)."""
    beat: subprocess.Popen[bytes] | None = None

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of one statement."""
        with psycopg.connect(self.postgres.url, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(sql, values)
            return [] if cursor.description is None else list(cursor.fetchall())

    def submit(self, jobs: int) -> str:
        """A batch of this many jobs that no other batch has asked; its id."""
        name = f"batch-{len(self.batches)}"
        return self.begin("submit", self.write_file(name, jobs), ids=[f"{name}-{number}" for number in range(jobs)])

    def begin(self, *command: str | Path, ids: list[str]) -> str:
        """The batch that this command begins, with these custom_ids; its id."""
        begun = stoker(*command, env=self.env)
        assert begun.returncode == 0, begun.stderr
        batch = begun.stdout.strip().removeprefix("batch_")
        self.batches[batch] = ids
        return batch

    def ids_in_files(self, batch: str) -> list[str]:
        """The custom_ids of all lines that a user gets of it, of its results and of its errors."""
        return self.ids_in_file(batch) + self.ids_in_file(batch, "--errors")

    def ids_in_file(self, batch: str, *which: str) -> list[str]:
        """The custom_ids of the lines of one of its files."""
        text = stoker("results", batch, *which, env=self.env).stdout
        return [json.loads(line)["custom_id"] for line in text.splitlines()]

    def write_file(self, name: str, jobs: int) -> Path:
        """A batch file whose prompts begin with its name."""
        file = self.folder / f"{name}.jsonl"
        with file.open("w") as opened:
            for number in range(jobs):
                body = {"model": "scripted", "messages": [{"role": "user", "content": f"{name}-{number}"}]}
                line = {"custom_id": f"{name}-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                opened.write(json.dumps(line) + "\n")
        return file

    def unfinished(self) -> int:
        """Jobs without a result in batches that will run them."""
        rows = self.query(
            "SELECT coalesce(sum(total), 0) - (SELECT count(*) FROM results r JOIN batches b ON b.id = r.batch_id "
            "WHERE b.state = 'in_progress') FROM batches WHERE state = 'in_progress'"
        )
        return int(rows[0][0])

    def note_unwritten(self) -> int:
        """How many jobs have been begun by an engine and have no result: what a fault now may cost."""
        results = int(self.query("SELECT count(*) FROM results WHERE source <> 'none'")[0][0])
        self.journal.read()
        return max(0, len(self.journal.began) - results)

    def replace(self, worker: WorkerProcess) -> None:
        """Start a worker in the place of a dead one, without waiting, as a supervisor does."""
        self.dead.append(worker)
        slot = self.workers.index(worker)
        self.workers[slot] = new = self._worker(slot)
        threading.Thread(target=new.__enter__, name=f"start-{slot}").start()

    def start_workers(self) -> None:
        """All of them at once."""
        self.workers = [self._worker(slot) for slot in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda worker: worker.__enter__(), self.workers))

    def start_beat(self) -> None:
        """A beat process; nothing may depend on it."""
        mark = {MARK: self.mark}
        command = [sys.executable, "-m", "celery", "-A", "worker.main", "beat", "-s", str(self.folder / "schedule")]
        with (self.folder / "beat.log").open("ab") as log:
            self.beat = subprocess.Popen(
                [*command, "--pidfile", ""],
                cwd=REPOSITORY,
                env={**clean_environment(), **self.env, **mark},
                stdout=log,
                stderr=log,
            )

    def end(self) -> None:
        """Nothing of it runs afterwards."""
        for worker in [*self.workers, *self.dead]:
            if hasattr(worker, "_process"):
                worker.__exit__(None, None, None)
        if self.beat is not None:
            self.beat.kill()
            self.beat.wait()
        kill_marked(self.mark)

    def __post_init__(self) -> None:
        self.mark = new_mark()

    def engines(self) -> list[SeenProcess]:
        """Every engine of this run that runs now, whoever its parent is."""
        return [seen for seen in seen_processes() if str(self.folder / "journal") in seen.command]

    def _worker(self, slot: int) -> WorkerProcess:
        return WorkerProcess(f"w{slot}", env=self.env, folder=self.folder)


def kill_all(processes: list[SeenProcess], number: int = signal.SIGKILL) -> None:
    """One signal to all of them."""
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


@contextmanager
def running_system(*, job_s: float, in_flight: int, shard_jobs: int) -> Iterator[System]:
    """Services, workers and beat, ready; ended with the block."""
    with served_system(job_s=job_s, in_flight=in_flight, shard_jobs=shard_jobs) as system:
        database = Database(system.postgres.url)
        migrate(database)
        database.close()
        system.start_workers()
        system.start_beat()
        yield system


@contextmanager
def served_system(*, job_s: float, in_flight: int, shard_jobs: int) -> Iterator[System]:
    """Services of its own, with no schema and no process yet; whatever is started is ended with the block."""
    with ExitStack() as stack:
        folder = stack.enter_context(server_folder())
        rabbitmq = stack.enter_context(OwnRabbitMQ(folder / "rabbitmq"))
        postgres = stack.enter_context(OwnPostgres(folder / "postgres"))
        redis = stack.enter_context(OwnRedis(folder / "redis"))
        env = install(folder, journal=folder / "journal", latency_s=job_s) | {
            "STOKER_POSTGRES__URL": postgres.url,
            "STOKER_BROKER__URL": rabbitmq.url,
            "STOKER_REDIS__URL": redis.url,
            "STOKER_HOME": str(folder / "home"),
            "STOKER_WORKER__IN_FLIGHT": str(in_flight),
            "STOKER_SHARD__MAX_JOBS": str(shard_jobs),
            "STOKER_WORKER__LEASE_S": str(LEASE_S),
            "STOKER_WORKER__HEARTBEAT_S": "1",
            "STOKER_WORKER__GRACE_S": "5",
            "COLUMNS": "200",
        }
        system = System(folder, postgres, redis, rabbitmq, env, Journal(folder / "journal"))
        stack.callback(system.end)
        yield system
