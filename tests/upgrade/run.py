"""Upgrades under load: code of an earlier commit works, the schema is migrated under it, this code takes over.

    python -m tests.upgrade.run                     (make upgrade)
    python -m tests.upgrade.run --from 83da5c1^     (make upgrade FROM=83da5c1^)

By default from the code before each of the newest three revisions; writes benchmarks/results/upgrade.json,
and its tables into docs/upgrade.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.paired import keep_run, made_with
from tests.chaos.checks import batch_problems, is_over, lost_and_blamed, process_problems, shard_problems
from tests.chaos.system import served_system
from tests.support.own_services import server_folder
from tests.support.waiting import wait_until
from tests.upgrade.code import Code, before_revisions, checked_out, this_code
from tests.upgrade.figures import PhaseFigures, errors_in, faults_in, figures_of, postgres_lines
from tests.upgrade.report import DOCUMENT, KEPT, TABLE_WAIT_S, document, row
from tests.upgrade.scenario import IN_FLIGHT, JOB_S, SHARD_JOBS, Note, Upgrade

BACK = 3
END_S = 300.0


@dataclass(slots=True)
class Outcome:
    """One upgrade. `problems` is empty when every promise held."""

    commit: str
    revision: str
    to_revision: str
    migration_s: float = 0.0
    migration_tries: int = 1
    batches: int = 0
    jobs: int = 0
    lost: int = 0
    failed: int = 0
    repeated: int = 0
    submitted: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    tried_again: int = 0
    phases: list[PhaseFigures] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_upgrade(old: Code, new: Code) -> Outcome:
    """From one to the other while batches run; then everything is counted."""
    outcome = Outcome(old.commit, old.revision, new.revision)
    with served_system(job_s=JOB_S, in_flight=IN_FLIGHT, shard_jobs=SHARD_JOBS) as system:
        upgrade = Upgrade(system, old=old, new=new)
        try:
            upgrade.run()
            wait_until(lambda: is_over(system), END_S, "every batch has ended")
            _count(upgrade, outcome)
        finally:
            upgrade.end()
    return outcome


def _count(upgrade: Upgrade, outcome: Outcome) -> None:
    system, client = upgrade.system, upgrade.client
    assert client is not None
    outcome.migration_s, outcome.migration_tries = upgrade.migration_s, upgrade.migration_tries
    outcome.batches = len(system.batches)
    outcome.jobs = int(system.query("SELECT sum(total) FROM batches")[0][0])
    outcome.lost, outcome.failed = lost_and_blamed(system)
    system.journal.read()
    outcome.repeated = system.journal.repeated
    outcome.submitted, outcome.read, outcome.tried_again = dict(client.submitted), dict(client.read), client.tried_again
    lines = postgres_lines(system.folder / "postgres.log")
    outcome.phases = figures_of(system, upgrade.marks, upgrade.waits)
    outcome.notes = upgrade.notes
    outcome.problems = [*upgrade.problems, *client.problems]
    outcome.problems += [*batch_problems(system), *shard_problems(system), *process_problems(system)]
    if outcome.lost or outcome.failed:
        outcome.problems.append(f"{outcome.lost} jobs lost, {outcome.failed} innocent jobs failed")
    for phase in outcome.phases:
        if phase.longest_table_wait_s > TABLE_WAIT_S:
            outcome.problems.append(f"{phase.name}: a statement waited {phase.longest_table_wait_s} s for a table")
    for name, log in upgrade.logs():
        outcome.problems += [f"{name}: {line}" for line in faults_in(log)]
    errors = errors_in(lines, since=dict(upgrade.marks)["migration"], until=time.time())
    unexpected = {said: times for said, times in errors.items() if said not in upgrade.expected_errors}
    outcome.problems += [f"Postgres: {said} ({times} times)" for said, times in unexpected.items()]


def table(outcome: Outcome) -> str:
    """Phases, what was seen beside them, and the counts."""
    lines = [
        f"from {outcome.commit}, revision {outcome.revision}, to {outcome.to_revision}",
        f"{'phase':44}{'s':>6}{'jobs':>7}{'jobs/s':>8}{'longest gap s':>15}{'waits for a table':>19}{'longest s':>11}",
    ]
    for phase in outcome.phases:
        lines.append(
            f"{phase.name:44}{phase.seconds:>6}{phase.jobs:>7}{phase.jobs_per_s:>8}{phase.longest_gap_s:>15}"
            f"{phase.table_waits:>19}{phase.longest_table_wait_s:>11}"
        )
    lines += [f"{note.what}: {note.seen}" for note in outcome.notes]
    lines.append(
        f"{outcome.batches} batches, {outcome.jobs} jobs: lost {outcome.lost}, failed {outcome.failed}, asked twice "
        f"{outcome.repeated}; submitted to code of {outcome.submitted}, read from code of {outcome.read}; the client "
        f"asked again {outcome.tried_again} times"
    )
    return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in outcome.problems)])


def main() -> int:
    """0 when every promise held in each of them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started goes with it
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--from", dest="commits", nargs="+", help="commits; by default those before the newest revisions"
    )
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    new = this_code()
    for number, commit in enumerate(options.commits or before_revisions(BACK)):
        with server_folder() as folder:
            outcomes.append(run_upgrade(checked_out(commit, Path(folder) / f"old-{number}"), new))
        print(table(outcomes[-1]), end="\n\n", flush=True)
    made = [asdict(outcome) for outcome in outcomes]
    report = {"made_with": made_with("celery", "alembic"), "upgrades": made}
    report["table"] = [row(upgrade).as_json() for upgrade in made]
    keep_run("upgrade", report, parser, options, is_whole=not any(outcome.problems for outcome in outcomes))
    DOCUMENT.write_text(document(DOCUMENT.read_text(), KEPT))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
