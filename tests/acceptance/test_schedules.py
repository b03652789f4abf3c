"""Schedules with real control workers and their beats, on a Redis of their own: what is killed or emptied runs once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
import redis

from models.states import Missed, Overlap
from pipeline.schedules import put_schedule
from runtime.clock import utc_now
from store.database import Database
from store.schedules import NewSchedule
from tests.acceptance.chats import prompts, write_chats
from tests.support.batches import execute, rows
from tests.support.beats import leading_beat
from tests.support.own_services import OwnRedis, server_folder
from tests.support.processes import SeenProcess, WorkerProcess
from tests.support.waiting import wait_until
from worker.beat import KEY_PREFIX

JOBS = 4
TAKEOVER_S = 10.0
SPARED_S = 45.0  # of Postgres's first half minute, in which no lease counts as over


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    with server_folder() as folder, OwnRedis(folder / "redis") as server:
        yield server


@pytest.fixture
def workers(env: dict[str, str], own_redis: OwnRedis, tmp_path: Path) -> Iterator[list[WorkerProcess]]:
    """A worker of the generation node and two of the control node, all up."""
    env |= {"STOKER_REDIS__URL": own_redis.url, "STOKER_SCHEDULE__TICK_S": "1", "STOKER_WORKER__CHILDREN": "1"}
    control = env | {"STOKER_WORKER__NODE": "control"}
    wanted = [WorkerProcess(name, env=control if name else env, folder=tmp_path) for name in ("", "first", "second")]
    with ExitStack() as running, ThreadPoolExecutor() as pool:
        yield list(pool.map(running.enter_context, wanted))


def test_a_killed_beat_an_emptied_redis_and_a_killed_worker_lose_no_run_and_make_no_second_batch(
    workers: list[WorkerProcess], own_redis: OwnRedis, database: Database, postgres_url: str, tmp_path: Path
) -> None:
    control = workers[1:]
    write_chats(tmp_path / "in.jsonl", prompts(JOBS))
    wait_until(lambda: all("beat_stands_by" in worker.log for worker in control), 30, "both have a beat")
    wait_until(lambda: leading_beat(control) is not None, 10, "one of them leads")
    killed = leading_beat(control)
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    let_be_due(database, "after-the-beat", folder=tmp_path)
    wait_until(lambda: leading_beat(control) not in (None, killed), TAKEOVER_S, "the other one leads")
    wait_until(lambda: outcome_of(database, "after-the-beat"), TAKEOVER_S, "what was due meanwhile is run")

    with psycopg.connect(postgres_url) as nobody_stores, psycopg.connect(postgres_url) as nobody_ends:
        with redis.Redis.from_url(own_redis.url) as emptied:
            emptied.flushall()
        nobody_stores.execute("LOCK TABLE batches IN SHARE MODE")
        let_be_due(database, "after-redis", folder=tmp_path)
        wait_until(lambda: any(map(command_of, control)), 2 * TAKEOVER_S, "its command runs")
        (runner,) = filter(command_of, control)
        nobody_ends.execute("SELECT FROM schedule_runs WHERE state = 'running' FOR UPDATE")
        nobody_stores.rollback()
        wait_until(lambda: len(batches_in(database)) == 2, TAKEOVER_S, "its batch is stored, which no run knows of")
        runner.kill9()
        wait_until(lambda: command_of(runner) is None, TAKEOVER_S, "its command has ended with it")
    execute(database, "UPDATE schedule_runs SET lease_until = now() - interval '1 s' WHERE state = 'running'")
    wait_until(lambda: outcome_of(database, "after-redis"), SPARED_S, "the other worker has run it again")

    assert rows(database, "SELECT state, tries FROM schedule_runs ORDER BY id") == [("succeeded", 1), ("succeeded", 2)]
    (other,) = (worker for worker in control if worker is not runner)
    assert other.terminate(SPARED_S) == 0
    with redis.Redis.from_url(own_redis.url) as left:
        assert not left.exists(f"{KEY_PREFIX}lock"), "a beat that ends gives the lead back"
    wait_until(lambda: set(batches_in(database)) == {"completed"}, 20, "their jobs have ended")
    assert rows(database, "SELECT count(*), count(DISTINCT batch_id) FROM results") == [(2 * JOBS, 2)]
    assert rows(database, "SELECT array_agg(batch_id ORDER BY batch_id) FROM schedule_runs") == rows(
        database, "SELECT array_agg(id ORDER BY id) FROM batches"
    )


def let_be_due(database: Database, name: str, *, folder: Path) -> None:
    """A schedule that submits the file each New Year, and the last one has nobody seen to yet."""
    new = NewSchedule(
        "local", name, "0 0 1 1 *", "UTC", ["submit", "in.jsonl"], str(folder), Missed.ONCE, Overlap.ALLOW
    )
    put_schedule(database, new, now=utc_now())
    execute(database, "UPDATE schedules SET due_until = now() - interval '1 year' WHERE name = :name", name=name)


def outcome_of(database: Database, name: str) -> str | None:
    """How the schedule's run ended; None before that."""
    statement = """
        SELECT r.state FROM schedule_runs r JOIN schedules s ON s.id = r.schedule_id
        WHERE s.name = :name AND r.ended_at IS NOT NULL"""
    found = rows(database, statement, name=name)
    return found[0][0] if found else None


def batches_in(database: Database) -> list[str]:
    """The states of all batches."""
    return [state for (state,) in rows(database, "SELECT state FROM batches")]


def command_of(worker: WorkerProcess) -> SeenProcess | None:
    """The command of a schedule that this worker runs."""
    return next((process for process in worker.processes() if "stoker submit" in process.command), None)
