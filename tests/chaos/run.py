"""Chaos: batches run while faults are committed; then everything is counted.

python -m tests.chaos.run --minutes 10 --seed 1 --job-s 0.2      (make chaos MINUTES=10 SEED=1 JOB_S=0.2)
"""

from __future__ import annotations

import argparse
import random
import secrets
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from benchmarks.paired import keep, made_with
from tests.chaos.checks import duplicated_lines, is_over, lost_and_blamed, problems
from tests.chaos.faults import FAULTS
from tests.chaos.system import WORKERS, System, running_system
from tests.support.waiting import wait_until

EVERY_S = 10.0
CHILDREN = 2
IN_FLIGHT = 4  # a child; chosen, not tuned: leaves room on two cores, so that a dip in speed is the fault's
END_S = 600.0
REPEATED_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Injected:
    """One fault as it was committed. `repeated` counts calls made twice from it to the next fault."""

    fault: str
    began_at: float
    took_s: float
    unwritten: int
    repeated: int
    seconds_to_full_speed: float | None


@dataclass(slots=True)
class Outcome:
    """A whole run. `problems` is empty when every promise held."""

    seed: int
    job_s: float
    jobs: int = 0
    seconds: float = 0.0
    lost: int = 0
    duplicated: int = 0
    blamed: int = 0
    repeated: int = 0
    bound: int = 0
    late_writes_refused: int = 0
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_chaos(
    schedule: Iterable[str], *, seed: int, job_s: float, batch_jobs: int, every_s: float = EVERY_S
) -> Outcome:
    """Run the schedule's faults, one every `every_s` or as soon after as it can be; wait for the end and count."""
    chance = random.Random(seed)
    shard_jobs = 16 if job_s < 5 else 8
    outcome = Outcome(seed, job_s)
    began = time.monotonic()
    with running_system(job_s=job_s, in_flight=IN_FLIGHT, shard_jobs=shard_jobs) as system:
        system.submit(batch_jobs)
        wait_until(lambda: system.note_unwritten() > 0, 60, "the first jobs have begun")
        _rest(system, until=time.monotonic() + 7, batch_jobs=batch_jobs)
        marks: list[tuple[str, float, float, int, int]] = []
        for name in schedule:
            marks.append(_commit(system, name, chance))
            _rest(system, until=marks[-1][1] + every_s, batch_jobs=batch_jobs)
        wait_until(lambda: is_over(system), END_S, "every batch has ended")
        system.note_unwritten()
        outcome.injected = _judged(system, marks)
        _count(system, outcome, every_s=every_s)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def _commit(system: System, name: str, chance: random.Random) -> tuple[str, float, float, int, int]:
    unwritten = system.note_unwritten()
    repeated = system.journal.repeated
    at = time.monotonic()
    FAULTS[name](system, chance)
    took = time.monotonic() - at
    unwritten = max(unwritten, system.note_unwritten())  # an outage adds what could not be written in it
    print(f"chaos: {name}: {took:.1f} s, {unwritten} unwritten", file=sys.stderr, flush=True)
    return name, at, took, unwritten, repeated


def _rest(system: System, *, until: float, batch_jobs: int) -> None:
    """Let it work until then, with another batch as soon as half a batch is left."""
    while True:
        if system.unfinished() < batch_jobs / 2:
            system.submit(batch_jobs)
        if time.monotonic() >= until:
            return
        time.sleep(0.25)


def _judged(system: System, marks: list[tuple[str, float, float, int, int]]) -> list[Injected]:
    ends = [mark[1] for mark in marks[1:]] + [system.journal.ended_at[-1] - 1.0]
    totals = [mark[4] for mark in marks[1:]] + [system.journal.repeated]
    return [
        Injected(
            name, at, round(took, 1), unwritten, total - before, system.journal.seconds_to_full_speed(at, until=end)
        )
        for (name, at, took, unwritten, before), end, total in zip(marks, ends, totals, strict=True)
    ]


def _count(system: System, outcome: Outcome, *, every_s: float) -> None:
    outcome.jobs = int(system.query("SELECT sum(total) FROM batches WHERE state <> 'validating'")[0][0])
    outcome.lost, outcome.blamed = lost_and_blamed(system)
    outcome.repeated = system.journal.repeated
    outcome.recoveries = system.recoveries
    outcome.bound = sum(fault.unwritten for fault in outcome.injected)
    outcome.late_writes_refused = sum(worker.log.count("fence_lost") for worker in [*system.workers, *system.dead])
    outcome.duplicated, outcome.problems = duplicated_lines(system), problems(system)
    if outcome.lost or outcome.blamed:
        outcome.problems.append(f"{outcome.lost} jobs lost, {outcome.blamed} innocent jobs failed")
    if outcome.duplicated:
        outcome.problems.append(f"{outcome.duplicated} lines too many in the files of results and errors")
    if outcome.repeated > outcome.bound:
        outcome.problems.append(f"{outcome.repeated} jobs repeated, above the {outcome.bound} that were unwritten")
    if outcome.job_s <= 1 and every_s >= EVERY_S and outcome.repeated > REPEATED_SHARE * outcome.jobs:
        outcome.problems.append(f"{outcome.repeated} of {outcome.jobs} jobs repeated: above 5 %")


def table(outcome: Outcome) -> str:
    """One line a fault: times, lost, duplicated, repeated, seconds to full speed."""
    lines = [f"{'fault':22}{'times':>6}{'lost':>6}{'dupl.':>6}{'repeated':>9}{'median s':>9}{'max s':>7}"]
    for name in FAULTS:
        same = [fault for fault in outcome.injected if fault.fault == name]
        if same:
            known = [fault.seconds_to_full_speed for fault in same if fault.seconds_to_full_speed is not None]
            middle = f"{statistics.median(known):.1f}" if known else "-"
            most = f"{max(known):.1f}" if len(known) == len(same) else "next"
            repeated = sum(fault.repeated for fault in same)
            lost, twice = ("?" if outcome.lost else "0"), ("?" if outcome.duplicated else "0")  # known in sum only
            lines.append(f"{name:22}{len(same):>6}{lost:>6}{twice:>6}{repeated:>9}{middle:>9}{most:>7}")
    lines.append(
        f"{'all':22}{len(outcome.injected):>6}{outcome.lost:>6}{outcome.duplicated:>6}{outcome.repeated:>9}"
        f"   {outcome.jobs} jobs in {outcome.seconds:.0f} s, seed {outcome.seed}, {outcome.job_s:g} s a job"
    )
    share = 100 * outcome.repeated / max(1, outcome.jobs)
    lines.append(
        f"repeated {share:.2f} % of the jobs, bound {outcome.bound}; late writes refused "
        f"{outcome.late_writes_refused}; `next`: not at full speed when the next fault came"
    )
    for what in dict.fromkeys(what for what, _ in outcome.recoveries):
        times = [seconds for name, seconds in outcome.recoveries if name == what]
        lines.append(f"after kill -9 of a worker: {what}: median {statistics.median(times):.1f} s, {len(times)} times")
    return "\n".join([*lines, *(f"BROKEN: {problem}" for problem in outcome.problems)])


def fair_schedule(chance: random.Random, *, until: float) -> Iterable[str]:
    """Every fault once in random order, and again, while there is time."""
    while True:
        for name in chance.sample(list(FAULTS), len(FAULTS)):
            if time.monotonic() >= until:
                return
            yield name


def main() -> int:
    """0 when every promise held."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--job-s", type=float, default=0.2)
    parser.add_argument("--batch-jobs", type=int)
    parser.add_argument("--faults", help="only these, in this order: a,b,c")
    given = parser.parse_args()
    batch_jobs = given.batch_jobs or (5000 if given.job_s < 5 else 100)
    until = time.monotonic() + 60 * given.minutes
    schedule = given.faults.split(",") if given.faults else fair_schedule(random.Random(given.seed), until=until)
    print(f"chaos: seed {given.seed}", file=sys.stderr)
    outcome = run_chaos(schedule, seed=given.seed, job_s=given.job_s, batch_jobs=batch_jobs)
    print(table(outcome))
    if not given.faults:
        settings = {"workers": WORKERS, "children": CHILDREN, "in_flight": IN_FLIGHT}
        name = "chaos" if given.job_s < 5 else "chaos_long_jobs"
        keep(name, {"made_with": made_with("celery", "kombu"), **settings, **asdict(outcome)})
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
