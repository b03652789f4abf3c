"""A service comes under pressure while a batch runs: doctor says so, and the batch completes when it ends."""

from __future__ import annotations

import json
from pathlib import Path

from store.database import Database
from store.schema import migrate
from tests.acceptance.chats import ids_of, parse_lines, prompts, results_in, write_chats
from tests.support.own_services import OwnPostgres, OwnRabbitMQ, server_folder, small_disk
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

JOBS = 200
EARLY = 40


def submit(folder: Path, env: dict[str, str]) -> tuple[str, list[str]]:
    ids = write_chats(folder / "in.jsonl", prompts(JOBS))
    submitted = stoker("submit", folder / "in.jsonl", env=env)
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip(), ids


def assert_each_once(batch: str, ids: list[str], env: dict[str, str]) -> None:
    ended = stoker("watch", batch, "--json", env=env)
    figures = json.loads(ended.stdout)
    assert (ended.returncode, figures["state"]) == (0, "completed"), ended.stderr
    assert (figures["done"], figures["failed"]) == (JOBS, 0)
    assert ids_of(parse_lines(stoker("results", batch, env=env).stdout)) == ids


def test_a_batch_outlasts_a_memory_alarm_of_rabbitmq(
    env: dict[str, str], tmp_path: Path, postgres_url: str, endpoint: ScriptedEndpoint
) -> None:
    with server_folder() as folder, OwnRabbitMQ(folder / "rabbitmq") as rabbit:
        env |= {"STOKER_BROKER__URL": rabbit.url}
        with WorkerProcess("pressed", env=env, folder=tmp_path):
            batch, ids = submit(tmp_path, env)
            wait_until(lambda: results_in(postgres_url) >= EARLY, 30, "the batch runs")
            endpoint.script("[[latency 5]]")  # the batch is still running when the alarm is on
            rabbit.raise_alarm()
            try:
                assert results_in(postgres_url) < JOBS
                said = stoker("doctor", env=env | {"COLUMNS": "500"}).stdout
                assert "low on memory" in said, said
            finally:
                rabbit.end_alarm()
                endpoint.script("")
            assert_each_once(batch, ids, env)


def test_a_batch_outlasts_a_full_disk_of_postgres(env: dict[str, str], tmp_path: Path) -> None:
    with server_folder() as folder, small_disk(40) as disk, OwnPostgres(folder / "rows") as postgres:
        url = postgres.database_on(disk)
        database = Database(url, pool_size=1)
        migrate(database)
        database.close()
        env |= {"STOKER_POSTGRES__URL": url}
        with WorkerProcess("pressed", env=env, folder=tmp_path) as worker:
            batch, ids = submit(tmp_path, env)
            wait_until(lambda: results_in(url) >= EARLY, 30, "the batch runs")
            ballast = disk / "ballast"
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 14))
                except OSError:
                    pass
            try:
                wait_until(lambda: "its disk is full" in worker.log, 60, "the worker says so")
                said = stoker("doctor", env=env | {"COLUMNS": "500"}).stdout
                assert "disk is full" in said, said
            finally:
                ballast.unlink()
            assert_each_once(batch, ids, env)
