"""The semantic cache in real workers, with a real embedder and a real Chroma; killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.chats import ids_of, parse_lines, results_in, write_chats
from tests.support.own_services import OwnChroma, server_folder
from tests.support.processes import WorkerProcess, stoker
from tests.support.queries import TOPICS, queries
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

JOBS = 320
MIDDLE = 100
PREFIX, SUFFIX = "Say in one word what this message is about: ", "\nOne word of refund, card, transfer or login:"


@pytest.fixture
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def semantic_env(env: dict[str, str], chroma: OwnChroma, endpoint: ScriptedEndpoint) -> dict[str, str]:
    for topic in TOPICS:
        endpoint.script(f"[[answer {topic}]]", match=f" {topic}{SUFFIX[:4]}")
    return env | {"STOKER_CACHE__CHROMA_URL": chroma.url}


def test_a_killed_worker_has_looked_no_job_up_twice_and_the_cache_tells_of_it(
    semantic_env: dict[str, str], tmp_path: Path, postgres_url: str, endpoint: ScriptedEndpoint
) -> None:
    env = semantic_env
    ids = write_chats(tmp_path / "in.jsonl", [PREFIX + query + SUFFIX for query in queries(JOBS)])
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        submitted = stoker("submit", tmp_path / "in.jsonl", "--cache", "semantic", "--set", "temperature=0", env=env)
        assert submitted.returncode == 0, submitted.stderr
        assert "320" in submitted.stderr and "2,000" in submitted.stderr, "it says that this is too few to certify"
        batch = submitted.stdout.strip()
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 60, "the batch is in its middle")
        for process in killed.processes():
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not killed.processes(), 5, "all of it is gone")
    assert results_in(postgres_url) < JOBS
    with WorkerProcess("next", env=env, folder=tmp_path):
        ended = stoker("watch", batch, "--json", env=env)
        assert (ended.returncode, json.loads(ended.stdout)["done"]) == (0, JOBS), ended.stderr
    lines = parse_lines(stoker("results", batch, env=env).stdout)
    assert ids_of(lines) == ids
    assert {line["stoker"]["source"] for line in lines} <= {"engine", "semantic"}
    with psycopg.connect(postgres_url) as connection:
        counted = connection.execute("SELECT lookups, policy FROM cache_namespaces").fetchall()
        unjudged = connection.execute("SELECT count(*) FROM cache_lookups WHERE judged_at IS NULL").fetchone()
    assert [(lookups, json.loads(policy)["lookups"]) for lookups, policy in counted] == [(JOBS, JOBS)]
    assert unjudged == (0,)
    stats = json.loads(stoker("cache", "stats", "--json", env=env).stdout)
    assert (stats["jobs"], stats["lookups_lost_to_outages"], len(stats["namespaces"])) == (JOBS, 0, 1)
    said = stoker("cache", "certify", env=env)
    assert "pilot" in said.stdout
    assert "320 lookups of version 1 seen" in said.stdout
    [certificate] = json.loads(stoker("cache", "certify", "--json", env=env).stdout)
    assert (certificate["state"], certificate["lookups"], certificate["served"]) == ("pilot", JOBS, 0)
    cleared = stoker("cache", "clear", env=env)
    assert (cleared.returncode, cleared.stderr.split()[0]) == (0, "320"), cleared.stderr
    assert stoker("cache", "certify", "7", env=env).returncode == 2
