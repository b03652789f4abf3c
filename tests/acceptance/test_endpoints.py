"""Workers without an engine of their own: registered endpoints do the jobs, and what cannot work says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.acceptance.chats import ids_of, prompts, read_lines, write_chats
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint

KEY = "sk-a-long-secret"
JOBS = 24


@pytest.fixture
def bare(env: dict[str, str]) -> dict[str, str]:
    """Settings of workers and commands without an engine."""
    return {name: value for name, value in env.items() if name != "STOKER_ENGINE__URL"} | {
        "STOKER_ENGINE__KIND": "none",
        "CLOUD_KEY": KEY,
    }


ENDPOINTS = """
[[endpoint]]
name = "box"
url = "{ours}"
trust = "own"
key_env = "CLOUD_KEY"
models = {{ scripted = "their-model" }}

[[endpoint]]
name = "cloud"
url = "{theirs}"
models = {{ dear = "x" }}
prices = {{ input = 1 }}
"""


def test_a_worker_without_an_engine_sends_jobs_to_registered_endpoints(bare: dict[str, str], tmp_path: Path) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(JOBS))
    file = tmp_path / "endpoints.toml"
    with ScriptedEndpoint(models=["their-model"], api_key=KEY) as ours, ScriptedEndpoint(models=["x"]) as theirs:
        file.write_text(ENDPOINTS.format(ours=ours.url, theirs=theirs.url))
        env = bare | {"STOKER_ENDPOINTS__FILE": str(file)}
        with WorkerProcess("bare", env=env, folder=tmp_path) as worker:
            ended = stoker("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", env=env)
            assert ended.returncode == 0, ended.stderr
            refused = stoker("submit", tmp_path / "in.jsonl", "--model", "dear", env=env)
            assert refused.returncode == 2 and "--trust external" in refused.stderr, refused.stderr
            assert KEY not in worker.log
        assert (ours.calls().count, theirs.calls().count) == (JOBS, 0)
    assert ids_of(read_lines(tmp_path / "out.jsonl")) == ids
    [engine] = json.loads((tmp_path / "out.manifest.json").read_text())["engines"]
    assert (engine["kind"], engine["name"], engine["models"]) == ("endpoint", "box", {"scripted": "their-model"})
