"""What must hold after a chaos run, whatever was done to it."""

from __future__ import annotations

from contextlib import suppress

from tests.chaos.system import System
from tests.support.waiting import wait_until

TERMINAL = {"completed", "failed", "expired", "cancelled"}


def problems(system: System) -> list[str]:
    """Every broken promise, in words; empty when all hold."""
    return [*batch_problems(system), *shard_problems(system), *process_problems(system), *_file_problems(system)]


def lost_and_blamed(system: System) -> tuple[int, int]:
    """(jobs without a result, jobs of uncancelled batches that ended as failed)."""
    lost = system.query(
        "SELECT coalesce(sum(total), 0) - (SELECT count(*) FROM results) FROM batches WHERE state <> 'validating'"
    )[0][0]
    early = list(system.ended_early)
    blamed = system.query(
        "SELECT count(*) FROM results WHERE outcome = 'failed' AND batch_id <> ALL(%s::uuid[])", early
    )[0][0]
    return int(lost), int(blamed)


def is_over(system: System) -> bool:
    """Whether every batch but the abandoned ones has ended."""
    rows = system.query(
        "SELECT count(*) FROM batches WHERE state <> ALL(%s) AND id <> ALL(%s::uuid[])",
        sorted(TERMINAL),
        list(system.never_visible),
    )
    return int(rows[0][0]) == 0


def batch_problems(system: System) -> list[str]:
    rows = system.query("""
        SELECT b.id, b.state, b.total, b.shards_left,
          (SELECT count(*) FROM jobs j WHERE j.batch_id = b.id),
          (SELECT count(DISTINCT j.custom_id) FROM jobs j JOIN results r USING (batch_id, seq) WHERE j.batch_id = b.id),
          (SELECT count(*) FROM results r WHERE r.batch_id = b.id),
          (SELECT count(*) FROM results r WHERE r.batch_id = b.id AND r.outcome = 'failed'),
          (SELECT coalesce(sum(s.done), 0) FROM shards s WHERE s.batch_id = b.id),
          (SELECT coalesce(sum(s.failed), 0) FROM shards s WHERE s.batch_id = b.id)
        FROM batches b""")
    found = []
    for batch, state, total, left, jobs, ids, results, failed, done_count, failed_count in rows:
        if str(batch) in system.never_visible:
            if (state, results) != ("validating", 0):
                found.append(f"the abandoned batch {batch} became {state} with {results} results")
            continue
        if state not in TERMINAL or left != 0:
            found.append(f"batch {batch} is {state} with {left} shards left")
        if not total == jobs == ids == results == done_count or failed != failed_count:
            found.append(
                f"batch {batch}: total {total}, jobs {jobs}, custom_ids with results {ids}, results {results}, "
                f"counted {done_count}; failed {failed}, counted {failed_count}"
            )
    return found


def shard_problems(system: System) -> list[str]:
    rows = system.query(
        "SELECT id, state, holder, lease_until FROM shards WHERE state <> 'done' AND batch_id <> ALL(%s::uuid[])",
        list(system.never_visible),
    )
    return [f"shard {row}" for row in rows]


def process_problems(system: System) -> list[str]:
    """Processes of dead workers, and engines beyond one a worker."""
    with suppress(AssertionError):  # listed below, with what runs
        wait_until(lambda: not any(worker.processes() for worker in system.dead), 15, "dead workers leave no process")
    found = [f"{worker.name} is dead, yet {left} runs" for worker in system.dead if (left := worker.processes())]
    living = {process.pid for worker in system.workers for process in worker.processes()}
    wait_until(lambda: len(system.engines()) >= len(system.workers), 90, "every worker has its engine")
    found += [f"the engine {engine} is nobody's" for engine in system.engines() if engine.pid not in living]
    if len(system.engines()) > len(system.workers):
        found.append(f"more engines than workers: {system.engines()}")
    return found


def _file_problems(system: System) -> list[str]:
    """The files that a user gets: every custom_id once, in results or errors."""
    found = []
    for batch, expected in system.batches.items():
        got = system.ids_in_files(batch)
        if sorted(got) != sorted(expected):
            found.append(f"batch {batch}: {len(got)} lines, {len(set(got))} custom_ids, of {len(expected)} jobs")
    return found


def duplicated_lines(system: System) -> int:
    """Lines beyond one for a custom_id, in the files of all batches."""
    files = [system.ids_in_files(batch) for batch in system.batches]
    return sum(len(ids) - len(set(ids)) for ids in files)
