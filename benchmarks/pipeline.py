"""Our pipeline alone, on an endpoint that costs nothing, beside one Celery task per prompt and Ray Data.

    python -m benchmarks.pipeline [--leg-s 6] [--pairs 5]

Postgres, RabbitMQ and Redis of its own; nginx with one ready-made answer on the first core, all else on the second,
then once more on all. Sides take turns. Ours are submitted before the clock, which runs from the batch's first second
in progress to its end; what the others' clocks leave out is in benchmarks/peers/. One more leg, unmeasured, is looked
at with py-spy. All pools of Celery take turns; of prefork's sizes the one with the best median counts, threads have a
row of their own. About 20 minutes. Prints its figures and writes benchmarks/results/pipeline.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.batch_lines import write_batch
from benchmarks.cores import kept_on, two_cores
from benchmarks.legs import Leg, run_ours
from benchmarks.paired import PAIRS, by_turns, keep_run, made_with
from benchmarks.peers import ray_leg
from benchmarks.peers.celery_leg import Stalled, run_celery
from benchmarks.pipeline_report import CELERY, OURS, RAY, UNIX, UNSHARDED, celery_side, report_of, show
from benchmarks.place import Place, own_place
from benchmarks.sampled import sampled
from benchmarks.static_endpoint import MODEL, StaticEndpoint
from runtime.settings import Settings

POOLS: Final = (("prefork", 8), ("prefork", 32), ("prefork", 128), ("threads", 32))
MOST_STALLED: Final = 10  # legs of one side that have to be run again
# Enough to say how fast a side is, from which the jobs of its legs follow.
PROBE_JOBS: Final = {OURS: 8_000, UNSHARDED: 500, CELERY: 2_000, RAY: 8_000}
WARM_UP_JOBS: Final = 256
LEAST_JOBS: Final = 500
PROFILE_S: Final = 10


@dataclass(slots=True)
class Sides:
    """Every side as a function of its jobs, and the legs that it has run."""

    place: Place
    folder: Path
    endpoint: StaticEndpoint
    legs: dict[str, list[Leg]] = field(default_factory=dict)
    stalled: Counter[str] = field(default_factory=Counter)

    def settings(self, *, unix: bool = False, unsharded: bool = False) -> Settings:
        """Of our worker."""
        base = self.place.settings
        url = self.endpoint.unix_url if unix else self.endpoint.url
        changed: dict[str, object] = {"engine": base.engine.model_copy(update={"url": url})}
        if unsharded:
            changed["shard"] = base.shard.model_copy(update={"max_jobs": 1})
        return base.model_copy(update=changed)

    def batch(self, jobs: int) -> Path:
        """A file of so many lines, written once."""
        path = self.folder / f"{jobs}.jsonl"
        return path if path.exists() else write_batch(path, jobs, model=MODEL)

    def ours(
        self,
        jobs: int,
        *,
        unix: bool = False,
        unsharded: bool = False,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Leg:
        """One leg of our worker."""
        return run_ours(
            self.settings(unix=unix, unsharded=unsharded),
            self.batch(jobs),
            self.place.servers,
            warm_up=self.batch(WARM_UP_JOBS),
            endpoint_pid=self.endpoint.pid,
            meanwhile=meanwhile,
        )

    def celery(self, jobs: int, *, pool: str, pool_size: int) -> Leg:
        """One leg of one task per prompt; one that stalls is counted, and run again."""
        settings, servers, side = self.place.settings, self.place.servers, celery_side(pool, pool_size)
        while True:
            try:
                return run_celery(settings, self.endpoint, servers, jobs=jobs, pool=pool, pool_size=pool_size)
            except Stalled as stall:
                print(f"  {side}: stopped for good: {stall}", flush=True)
                self.stalled[side] += 1
                if self.stalled[side] > MOST_STALLED:
                    raise

    def ray(self, jobs: int) -> Leg:
        """One leg of Ray Data."""
        parts = self.folder / f"parts-{jobs}"
        if not parts.exists():
            ray_leg.write_parts(parts, jobs)
        return ray_leg.run_ray(self.place, self.endpoint, parts, jobs=jobs)

    def runs(self) -> dict[str, Callable[[int], Leg]]:
        """The sides that can run here."""
        sides: dict[str, Callable[[int], Leg]] = {
            OURS: self.ours,
            UNSHARDED: partial(self.ours, unsharded=True),
            UNIX: partial(self.ours, unix=True),
            **{celery_side(*pool): partial(self.celery, pool=pool[0], pool_size=pool[1]) for pool in POOLS},
        }
        return {**sides, RAY: self.ray} if ray_leg.is_there() else sides

    def turn(self, name: str, jobs: int) -> float:
        """Run one leg of a side and keep it."""
        leg = self.runs()[name](jobs)
        self.legs.setdefault(name, []).append(leg)
        print(f"  {name}: {leg.jobs_per_s:,.0f} jobs/s ({leg.jobs:,} in {leg.seconds:.1f} s)", flush=True)
        return leg.jobs_per_s


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leg-s", type=float, default=6, help="how long a leg is to take")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    cores = two_cores()
    if not ray_leg.is_there():
        print("without Ray Data: `make ray-env` has not been run")
    found: dict[str, Any] = {}
    with own_place() as place, tempfile.TemporaryDirectory() as folder:
        with kept_on({cores[1]}, place.servers) as pinned, StaticEndpoint(core=cores[0]) as endpoint:
            print("on one core, the endpoint on another")
            sides = Sides(place, Path(folder), endpoint)
            found["pinned"] = {"endpoint": cores[0], "all else": cores[1], "what": pinned}
            found["servers"] = place.versions()
            found["endpoint"] = f"nginx {endpoint.version()}"
            jobs = _probed(sides, leg_s=options.leg_s)
            found["profile"] = _profiled(sides, jobs[OURS])
            found["one_core"] = _measured(sides, jobs, pairs=options.pairs)
        with StaticEndpoint(core=None) as endpoint:
            print("on all cores")
            shared = Sides(place, Path(folder), endpoint)
            some = {name: count for name, count in jobs.items() if name not in (UNIX, UNSHARDED)}
            found["all_cores"] = _measured(shared, some, pairs=options.pairs)
    made = made_with("celery", "httptools", "uvloop", "psycopg", "sqlalchemy")
    report = report_of({"made_with": made, "options": vars(options), **found})
    show(report)
    keep_run("pipeline", report, parser, options, is_whole=ray_leg.is_there())


def _probed(sides: Sides, *, leg_s: float) -> dict[str, int]:
    """The jobs of a leg of every side, from how fast it is; all pools of Celery have as many."""
    speeds = {OURS: sides.ours(PROBE_JOBS[OURS]).jobs_per_s}
    speeds[UNIX] = speeds[OURS]
    speeds[UNSHARDED] = sides.ours(PROBE_JOBS[UNSHARDED], unsharded=True).jobs_per_s
    celery = sides.celery(PROBE_JOBS[CELERY], pool=POOLS[0][0], pool_size=POOLS[0][1]).jobs_per_s
    speeds |= {celery_side(*pool): celery for pool in POOLS}
    if ray_leg.is_there():
        speeds[RAY] = sides.ray(PROBE_JOBS[RAY]).jobs_per_s
    return {name: max(round(speed * leg_s / 100) * 100, LEAST_JOBS) for name, speed in speeds.items()}


def _profiled(sides: Sides, jobs: int) -> dict[str, Any]:
    """Where one child of our worker spends its CPU."""
    looks: list[dict[str, Any]] = []
    sides.ours(2 * jobs, meanwhile=lambda pid: looks.append(sampled(pid, seconds=PROFILE_S)))
    return looks[0]


def _measured(sides: Sides, jobs: Mapping[str, int], *, pairs: int) -> dict[str, Any]:
    """Every leg of every side, by turns."""
    turns: dict[str, Callable[[], float]] = {
        name: partial(sides.turn, name, count) for name, count in jobs.items() if name in sides.runs()
    }
    speeds = by_turns(turns, pairs=pairs)
    return {
        "jobs_per_s": speeds,
        "legs": {name: [leg.as_json() for leg in legs] for name, legs in sides.legs.items()},
        "stalled": dict(sides.stalled),
    }


if __name__ == "__main__":
    main()
