"""A backup of a running system, everything lost, a restore: every job ends once, and nobody of before disturbs it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text

from store.batches import resume
from store.database import Database
from tests.support.backups import backed_up, empty_again, restored
from tests.support.batches import batch_row, chat, chats, rows, store_batch
from tests.support.processes import WorkerProcess
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

FIRST, SECOND, LAST = 30, 10, 40
LONG_LEASES = {"STOKER_WORKER__LEASE_S": "90", "STOKER_WORKER__HEARTBEAT_S": "30"}  # nobody waits for them to end


def results(database: Database) -> set[tuple[object, ...]]:
    """All results, with the moment of their writing."""
    return set(rows(database, "SELECT batch_id, seq, response, created_at FROM results"))


def named(name: str, count: int) -> list[dict[str, Any]]:
    """As many bodies whose prompts bear this name."""
    return [chat(f"{name} {number}") for number in range(count)]


def signal_all(worker: WorkerProcess, number: int) -> None:
    for process in worker.processes():
        os.kill(process.pid, number)


def pause(database: Database, batch_id: UUID) -> None:
    with database.transaction() as session:
        session.execute(text("UPDATE batches SET paused_reason = 'a test' WHERE id = :id"), {"id": batch_id})


def test_a_batch_goes_on_from_a_backup_of_its_middle(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, database: Database, postgres_url: str
) -> None:
    for name in ("second", "last"):
        endpoint.script("[[held]]", match=name)
    with WorkerProcess("old", env=env | LONG_LEASES, folder=tmp_path) as old:
        ended = store_batch(database, tmp_path, [chat("of a batch that has ended")])
        wait_until(lambda: batch_row(database, ended)["state"] == "completed", 60, "a batch has ended")
        prompts = [*named("first", FIRST), *named("second", SECOND), *named("last", LAST)]
        batch = store_batch(database, tmp_path, prompts, shard_jobs=10)
        wait_until(lambda: len(results(database)) == 1 + FIRST, 60, "the first have ended")
        before = results(database)
        backup = backed_up(postgres_url, tmp_path)
        later = store_batch(database, tmp_path, chats(10), shard_jobs=10)
        endpoint.script("", match="second")
        wait_until(lambda: results(database) > before, 60, "more is done after the backup")
        wait_until(lambda: any("last" in prompt for prompt in endpoint.calls().prompts), 60, "the last are asked for")
        # The disk is lost. The worker hangs meanwhile, and wakes with the answers to what it had asked for.
        signal_all(old, signal.SIGSTOP)
        assert batch_row(database, batch)["state"] == "in_progress"
        empty_again(postgres_url)
        restored(backup, url=postgres_url)
        assert before <= results(database)
        pause(database, batch)  # else the old one, as long as it lives, may claim a shard anew and take it along
        lost = old.log.count("fence_lost")
        endpoint.forget()
        signal_all(old, signal.SIGCONT)
        wait_until(lambda: old.log.count("fence_lost") > lost, 60, "what the old worker writes is refused")
        signal_all(old, signal.SIGKILL)
        wait_until(lambda: not old.processes(), 20, "all of it is gone")
    assert results(database) == before
    with database.transaction() as session:
        assert resume(session, batch)
    # RabbitMQ and Redis are as the old life left them: hints of shards that are not there, presence, answers.
    with WorkerProcess("new", env=env | LONG_LEASES, folder=tmp_path):
        wait_until(lambda: batch_row(database, batch)["state"] == "completed", 60, "the batch ends")
    each_once = "SELECT count(*), count(DISTINCT seq), min(outcome) FROM results WHERE batch_id = :batch"
    assert rows(database, each_once, batch=batch) == [(len(prompts), len(prompts), "succeeded")]
    assert before <= results(database), "what was there at the backup was not written again"
    assert rows(database, "SELECT sum(done), sum(crashes) FROM shards WHERE batch_id = :batch", batch=batch) == [
        (len(prompts), 0)
    ]
    assert batch_row(database, ended)["state"] == "completed"
    assert rows(database, "SELECT 1 FROM batches WHERE id = :later", later=later) == []
