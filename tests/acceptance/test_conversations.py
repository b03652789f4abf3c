"""Conversations outlive their worker: what was answered is not asked again, whichever of the stores is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.chats import MODEL, parse_lines
from tests.support.conversing import empty_redis
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

CONVERSATIONS, TURNS = 60, 4
REQUESTS = CONVERSATIONS * TURNS
IN_FLIGHT = 16  # 2 children with 8 each
MIDDLE = 90


def turns_of(number: int) -> list[str]:
    return [f"conversation {number} turn {turn}" for turn in range(TURNS)]


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A batch file of conversations."""
    file = tmp_path / "in.jsonl"
    with file.open("w") as lines:
        for number in range(CONVERSATIONS):
            head = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions"}
            rest = {"body": {"model": MODEL}, "stoker": {"turns": turns_of(number)}}
            lines.write(json.dumps({**head, **rest}) + "\n")
    return file


def submit(file: Path, env: dict[str, str]) -> str:
    submitted = stoker("submit", file, env=env)
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def kept(postgres_url: str) -> int:
    """How many requests have their replies in Postgres, in steps or in the results of their conversations."""
    with psycopg.connect(postgres_url) as connection:
        row = connection.execute(
            "SELECT (SELECT count(*) FROM job_steps) + %s * (SELECT count(*) FROM results)", [TURNS]
        ).fetchone()
    assert row is not None
    return int(row[0])


def repeated(endpoint: ScriptedEndpoint) -> int:
    """How many requests asked what had been asked before."""
    return sum(count - 1 for count in endpoint.calls().prompts.values())


def assert_each_whole(batch: str, env: dict[str, str]) -> None:
    ended = stoker("watch", batch, env=env)
    assert ended.returncode == 0, ended.stderr
    lines = parse_lines(stoker("results", batch, env=env).stdout)
    assert [line["custom_id"] for line in lines] == [f"id-{number}" for number in range(CONVERSATIONS)]
    for number, line in enumerate(lines):
        conversation = line["stoker"]["conversation"]
        said = [message["content"] for message in conversation["messages"]]
        assert said == [text for turn in turns_of(number) for text in (turn, f"echo: {turn}")]
        assert (conversation["id"], conversation["turns"]) == (line["id"], TURNS)


def kill(worker: WorkerProcess) -> None:
    """As the kernel does with a container: all at once."""
    for process in worker.processes():
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not worker.processes(), 5, "all of it is gone")


def test_a_killed_worker_costs_the_requests_in_flight(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, conversations: Path
) -> None:
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        batch = submit(conversations, env)
        wait_until(lambda: endpoint.calls().count >= MIDDLE, 30, "the batch is in its middle")
        kill(killed)
    asked = endpoint.calls().count
    unwritten = asked - kept(postgres_url)
    assert asked < REQUESTS
    with WorkerProcess("next", env=env, folder=tmp_path):
        assert_each_whole(batch, env)
    print(
        f"\nkill -9 after {asked} of {REQUESTS} requests: {repeated(endpoint)} repeated; not in Postgres: {unwritten}"
    )
    assert repeated(endpoint) <= IN_FLIGHT


def test_a_kill_while_redis_is_emptied_costs_what_postgres_has_not(
    env: dict[str, str],
    tmp_path: Path,
    endpoint: ScriptedEndpoint,
    postgres_url: str,
    redis_url: str,
    conversations: Path,
) -> None:
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        batch = submit(conversations, env)
        wait_until(lambda: endpoint.calls().count >= MIDDLE, 30, "the batch is in its middle")
        kill(killed)
        empty_redis(redis_url)
    unwritten = endpoint.calls().count - kept(postgres_url)
    with WorkerProcess("next", env=env, folder=tmp_path):
        assert_each_whole(batch, env)
    print(f"\nkill -9 and an empty Redis: {repeated(endpoint)} of {REQUESTS} repeated; not in Postgres: {unwritten}")
    assert repeated(endpoint) <= unwritten
