"""A job that kills its worker: it ends alone as `poison_job`, its neighbours succeed, and `status --dead` names it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.acceptance.chats import ids_of, parse_lines, prompts, write_chats
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint

KILLER = "kills its worker [[latency 60]]"
KILLER_SEQ = 5


@contextmanager
def assassin(postgres_url: str, endpoint: ScriptedEndpoint) -> Iterator[list[int]]:
    """Kill -9 the child that runs the killer's shard whenever the endpoint has been sent it once more."""
    stop, killed = threading.Event(), list[int]()

    def watch() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            while not stop.wait(0.05):
                if endpoint.calls().prompts.get(KILLER, 0) <= len(killed):
                    continue
                row = connection.execute(
                    "SELECT holder FROM shards WHERE state = 'running' AND %s = ANY(seqs)", (KILLER_SEQ,)
                ).fetchone()
                if row is not None and int(row[0].rpartition(":")[2]) not in killed:
                    killed.append(int(row[0].rpartition(":")[2]))
                    os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def test_a_job_that_kills_its_worker_ends_alone_as_poison_and_its_neighbours_succeed(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str
) -> None:
    asked = prompts(16)
    asked[KILLER_SEQ] = KILLER
    ids = write_chats(tmp_path / "in.jsonl", asked)
    env = env | {
        "STOKER_SHARD__MAX_JOBS": "4",
        "STOKER_WORKER__LEASE_S": "1.5",
        "STOKER_WORKER__HEARTBEAT_S": "0.5",
    }
    with WorkerProcess("one", env=env, folder=tmp_path), assassin(postgres_url, endpoint) as killed:
        batch = stoker("submit", tmp_path / "in.jsonl", env=env).stdout.strip()
        ended = stoker("watch", batch, "--json", env=env)
    figures = json.loads(ended.stdout)
    assert (ended.returncode, figures["state"], figures["failed"]) == (1, "completed", 1), ended.stderr
    answered = parse_lines(stoker("results", batch, env=env).stdout)
    [refused] = parse_lines(stoker("results", batch, "--errors", env=env).stdout)
    assert refused["custom_id"] == ids[KILLER_SEQ]
    assert refused["error"]["code"] == "poison_job"
    assert ids_of(answered) == [name for name in ids if name != ids[KILLER_SEQ]]
    assert [row["custom_id"] for row in json.loads(stoker("status", "--dead", "--json", env=env).stdout)] == [
        ids[KILLER_SEQ]
    ]
    print(f"\n{len(killed)} children died of the killer")
