"""What a job costs to run as batches and tables grow: CPU of submit, worker, dispatch and Postgres, on a free endpoint.

    python -m benchmarks.growth [--small 10000] [--large 1000000] [--finished 1000000]

By turns: a small batch in an empty database, a large one in an empty database, and a small one in a database that
already holds as many finished jobs as stated. Services of its own; nginx on the first core, all else on the second.
About 25 minutes. Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.batch_lines import write_batch
from benchmarks.cores import kept_on, two_cores
from benchmarks.legs import Leg, run_ours
from benchmarks.own_batch import stored
from benchmarks.paired import PAIRS, Ratio, by_turns, keep_run, made_with
from benchmarks.place import Place, own_place
from benchmarks.rows import Row, at_most, bold
from benchmarks.static_endpoint import MODEL, StaticEndpoint
from benchmarks.submit_files import fill_results
from runtime.settings import Settings
from scripts.local import prepare_schema
from store.database import Database

COMMAND: Final = "`make bench-growth`"
FULL: Final = "stoker_full"
COUNTED: Final = ("submit", "worker parent", "worker children", "dispatcher", "postgres")
WARM_UP_JOBS: Final = 512
TARGET: Final = 1.1


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    cores = two_cores()
    legs: dict[str, list[Leg]] = {}
    with own_place() as place, tempfile.TemporaryDirectory() as name, StaticEndpoint(core=cores[0]) as endpoint:
        folder = Path(name)
        servers = place.versions()
        full = filled(place.settings, folder, jobs=options.finished)
        with kept_on({cores[-1]}, place.servers) as pinned:
            sides = {
                "small": (place.settings, options.small, True),
                "large": (place.settings, options.large, True),
                "small, late": (full, options.small, False),
            }
            turns = {
                side: partial(turn, legs.setdefault(side, []), place, endpoint, folder, *what)
                for side, what in sides.items()
            }
            costs = by_turns(turns, pairs=options.pairs)
    report: dict[str, Any] = {
        "made_with": made_with("celery", "httptools", "psycopg", "sqlalchemy"),
        "servers": servers,
        "options": vars(options),
        "endpoint": f"nginx {endpoint.version()}",
        "pinned": pinned,
        "jobs": {"small": options.small, "large": options.large, "finished": options.finished},
        "cpu_us": costs,
        "legs": {side: [leg.as_json() for leg in found] for side, found in legs.items()},
    }
    report["table"] = [row.as_json() for row in rows(report)]
    keep_run("growth", report, parser, options)
    for row in rows(report):
        print(f"{row.figure}: {row.measured} {row.verdict}".replace("**", ""))


def filled(settings: Settings, folder: Path, *, jobs: int) -> Settings:
    """Settings of another database of the same server, with so many finished jobs in it."""
    print(f"filling a database with {jobs:,} finished jobs", flush=True)
    url = settings.require_postgres()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {FULL}")
    full = settings.model_copy(
        update={"postgres": settings.postgres.model_copy(update={"url": f"{url.rpartition('/')[0]}/{FULL}"})}
    )
    prepare_schema(full)
    file = write_batch(folder / "finished.jsonl", jobs, model=MODEL)
    database = Database(full.require_postgres())
    try:
        fill_results(full.require_postgres(), stored(database, file, full))
    finally:
        database.close()
    file.unlink()
    return full


def turn(
    legs: list[Leg],
    place: Place,
    endpoint: StaticEndpoint,
    folder: Path,
    settings: Settings,
    jobs: int,
    is_emptied: bool,
) -> float:
    """CPU microseconds a job of one leg."""
    if is_emptied:
        with psycopg.connect(settings.require_postgres(), autocommit=True) as connection:
            connection.execute("TRUNCATE batches, jobs, shards, results CASCADE")
    file, warm_up = (folder / f"{count}.jsonl" for count in (jobs, WARM_UP_JOBS))
    for path, count in ((file, jobs), (warm_up, WARM_UP_JOBS)):
        if not path.exists():
            write_batch(path, count, model=MODEL)
    served = settings.model_copy(update={"engine": settings.engine.model_copy(update={"url": endpoint.url})})
    leg = run_ours(served, file, place.servers, warm_up=warm_up, endpoint_pid=endpoint.pid)
    legs.append(leg)
    spent = sum(leg.cpu_us[name] for name in COUNTED)
    print(f"  {jobs:,} jobs{'' if is_emptied else ', late'}: {spent:.0f} µs, {leg.jobs_per_s:,.0f} jobs/s", flush=True)
    return spent


def rows(report: dict[str, Any]) -> list[Row]:
    """A larger batch, and a fuller table, each against a small batch in an empty one."""
    costs, jobs = report["cpu_us"], report["jobs"]
    small = statistics.median(costs["small"])
    asked = {
        "large": f"of a batch of {jobs['large']:,}",
        "small, late": f"of a batch of {jobs['small']:,} beside {jobs['finished']:,} finished jobs",
    }
    found = []
    for side, words in asked.items():
        ratio = Ratio.of(costs[side], costs["small"])
        found.append(
            Row(
                f"CPU a job of submit, worker, dispatch, Postgres {words} ÷ one of {jobs['small']:,} in empty tables",
                f"{bold(ratio)}; {statistics.median(costs[side]):.0f} and {small:.0f} µs",
                COMMAND,
                headline=True,
                **at_most(ratio.median, TARGET),
            )
        )
    return found


if __name__ == "__main__":
    main()
