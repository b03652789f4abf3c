"""Without any server: embedded Postgres and Valkey, llama.cpp, one command; and `stoker up` for several."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from inference.checkpoints import digest_of
from tests.acceptance.chats import ids_of, parse_lines, read_lines
from tests.support.own_services import free_port
from tests.support.processes import REPOSITORY, Command, clean_environment, marked, new_mark, seen_processes, stoker
from tests.support.waiting import wait_until

GGUF = next(iter(sorted((REPOSITORY / ".checkpoints").glob("smollm2-135m-gguf/*.gguf"))), None)
LINES = 12
UP_S = 120.0

pytestmark = pytest.mark.skipif(GGUF is None, reason="no .gguf checkpoint: run `make checkpoint-gguf`")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home for all tests here; short for the sockets, open for the servers' account under root."""
    with tempfile.TemporaryDirectory(prefix="stoker-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "home"


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    return {"STOKER_HOME": str(home), "STOKER_ENGINE__KIND": "llamacpp", "COLUMNS": "200"}


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """The first lines of the examples."""
    file = tmp_path / "in.jsonl"
    with (REPOSITORY / "examples" / "prompts.jsonl").open() as examples:
        file.write_text("".join(islice(examples, LINES)))
    return file


def left_behind(home: Path, mark: str) -> list[str]:
    """What still runs of a command: by its mark, or by the home in its command line."""
    return [
        process.command
        for process in [*marked(mark), *seen_processes()]
        if process.mark == mark or f"{home}/" in process.command
    ]


def test_run_needs_no_server_and_leaves_files_and_no_process(
    env: dict[str, str], home: Path, tmp_path: Path, prompts_file: Path
) -> None:
    mark = new_mark()
    output = tmp_path / "out.jsonl"
    with Command(
        "run", prompts_file, "-o", output, "--json", "--max-output-tokens", "16", "--cache", "off", env=env, mark=mark
    ) as command:
        ended = command.wait(240)
        assert left_behind(home, mark) == []
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert (figures["done"], figures["failed"]) == (LINES, 0)
    assert ids_of(read_lines(output)) == ids_of(parse_lines(prompts_file.read_text()))
    assert figures["files"] == {"results": str(output), "manifest": str(tmp_path / "out.manifest.json")}
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert GGUF is not None
    assert [(engine["kind"], engine["checkpoint_digest"]) for engine in manifest["engines"]] == [
        ("llamacpp", digest_of(GGUF))
    ]
    assert manifest["tokens"]["completion"] == figures["tokens_out"] > 0
    assert manifest["jobs"]["done"] == LINES


def test_up_serves_other_terminals_until_ctrl_c(
    env: dict[str, str], home: Path, tmp_path: Path, prompts_file: Path
) -> None:
    mark = new_mark()
    elsewhere = {"STOKER_HOME": str(home), "COLUMNS": "200"}
    port, flower = free_port(), free_port()
    ports = {"STOKER_GATEWAY__PORT": str(port), "STOKER_FLOWER__PORT": str(flower)}
    with Command("up", env=env | ports, mark=mark) as up:
        wait_until(lambda: _is_up(up, elsewhere), UP_S, "stoker up is up")
        submitted = stoker("submit", prompts_file, "--max-output-tokens", "8", env=elsewhere)
        assert submitted.returncode == 0, submitted.stderr
        batch = submitted.stdout.strip()
        watched = stoker("watch", batch, env=elsewhere)
        assert watched.returncode == 0, watched.stderr
        lines = parse_lines(stoker("results", batch, env=elsewhere).stdout)
        assert ids_of(lines) == ids_of(parse_lines(prompts_file.read_text()))
        wait_until(lambda: _get(port, "/") is not None, UP_S, "the page is there")
        key = (home / "key").read_text().strip()
        newest, *_ = _batches(port, key)
        assert (newest["id"], newest["status"]) == (batch, "completed"), "its first key sees what commands submit"
        wait_until(lambda: _get(flower, "/healthcheck") is not None, UP_S, "Flower is there")
        assert (home / "flower-password").stat().st_mode & 0o777 == 0o600
        password = (home / "flower-password").read_text().strip()
        queues = json.loads(_get(flower, "/api/queues/length", login=f"stoker:{password}") or b"{}")["active_queues"]
        assert {"generation", "stoker.dead"} <= {queue["name"] for queue in queues}, "on Valkey too"
        added = stoker(
            *("schedule", "add", "each-new-year", "--cron", "@yearly", "--", "submit", prompts_file), env=elsewhere
        )
        assert added.returncode == 0 and stoker("schedule", "run", "each-new-year", env=elsewhere).returncode == 0
        wait_until(lambda: len(_batches(port, key)) == 2, UP_S, "its control worker has submitted the file again")
        told = json.loads(stoker("up", "--json", env=elsewhere).stdout)
        assert told == {"url": f"http://127.0.0.1:{port}/v1", "key_file": str(home / "key")}, "no second one is started"
        asked = "import stoker_client; print(stoker_client.run(['Hi.'], max_output_tokens=4, progress=False)[0].source)"
        joined = subprocess.run(
            [sys.executable, "-c", asked],
            env={**clean_environment(), **elsewhere},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert joined.stdout == "engine\n", joined.stderr
        up.process.send_signal(signal.SIGINT)
        ended = up.wait(60)
        assert left_behind(home, mark) == []
    assert ended.returncode == 0, ended.stderr
    assert not (home / "services.json").exists()
    after = stoker("status", env=elsewhere)
    assert after.returncode == 3 and "stoker up" in after.stderr


def _is_up(up: Command, env: dict[str, str]) -> bool:
    assert up.process.poll() is None, up.wait().stderr
    found = stoker("doctor", "--json", env=env)
    return '"worker ' in found.stdout


def _batches(port: int, key: str) -> list[dict[str, str]]:
    """All, the newest first."""
    return list(json.loads(_get(port, "/v1/batches", key) or b'{"data": []}')["data"])


def _get(port: int, path: str, key: str = "", *, login: str = "") -> bytes | None:
    """What the gateway answers who has a key, or Flower who has a name and password; None while it does not."""
    shown = f"Basic {base64.b64encode(login.encode()).decode()}" if login else f"Bearer {key}"
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": shown})
    try:
        with urllib.request.urlopen(request, timeout=10.0) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, OSError):
        return None
