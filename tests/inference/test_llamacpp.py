"""The real llama.cpp server with the small checkpoint that `make` fetches."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import aiohttp
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = REPOSITORY / ".checkpoints" / "smollm2-135m-gguf"
ALIAS = "small"
START_TIMEOUT_S = 120.0  # loading takes 1 s, and 10 s while other tests use both cores
STOP_TIMEOUT_S = 2.0
COLOURS: Mapping[str, Any] = {
    "model": ALIAS,
    "messages": [{"role": "user", "content": "Name three colours."}],
    "max_tokens": 8,
    "temperature": 0,
}


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    found = sorted(CHECKPOINTS.glob("*.gguf"))
    assert found, f"no checkpoint in {CHECKPOINTS}: run `make` or scripts/fetch_checkpoint.py"
    return found[0]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a unix socket's may have 103 bytes."""
    with tempfile.TemporaryDirectory(prefix="stoker-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Path]:
    """The socket of a server that generates, with two slots of 256 tokens."""
    with tempfile.TemporaryDirectory(prefix="stoker-", dir="/tmp") as path:
        uds = Path(path) / "engine.sock"
        server = start(checkpoint, "--uds", str(uds), "--slots", "2", "--context-per-slot", "256")
        wait_until_healthy(server, uds)
        yield uds
        stop(server)


def start(checkpoint: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "inference.llamacpp", "--checkpoint", str(checkpoint), "--alias", ALIAS]
    return subprocess.Popen(
        [*command, "--threads", "1", *options],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ask(uds: Path, path: str, *, body: Mapping[str, Any] | None = None, timeout_s: float = 60.0) -> tuple[int, Any]:
    """Status and parsed body (as text where it is no JSON); GET without a body, else POST."""
    connection = HTTPConnection("engine")
    with socket.socket(socket.AF_UNIX) as connection.sock:
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(str(uds))
        method, payload = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    return response.status, json.loads(text) if text.startswith("{") else text


def wait_until_healthy(server: subprocess.Popen[bytes], uds: Path) -> set[int]:
    """Wait for 200 on /health; return the statuses seen on the way."""
    statuses: set[int] = set()
    end = time.monotonic() + START_TIMEOUT_S
    while 200 not in statuses:
        assert server.poll() is None, server.communicate()[0].decode()
        assert time.monotonic() < end, "the engine did not become healthy"
        try:
            statuses.add(ask(uds, "/health")[0])
        except OSError:
            time.sleep(0.01)
    return statuses


def stop(server: subprocess.Popen[bytes]) -> tuple[int, str]:
    """SIGTERM; the exit status and all output. Fails when it takes too long."""
    server.send_signal(signal.SIGTERM)
    try:
        output = server.communicate(timeout=STOP_TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        server.kill()
        server.communicate()
        raise
    return server.returncode, output.decode()


def catches_sigterm(server: subprocess.Popen[bytes]) -> bool:
    """Whether its handler is in place: it may serve a moment before, and then SIGTERM ends it by itself."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def counter(uds: Path, name: str) -> float:
    lines = ask(uds, "/metrics")[1].splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"llamacpp:{name} ")))


def test_a_chat_is_answered_with_its_usage_and_the_alias(engine: Path) -> None:
    status, answer = ask(engine, "/v1/chat/completions", body=COLOURS)
    assert (status, answer["model"]) == (200, ALIAS)
    assert answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    assert [entry["id"] for entry in ask(engine, "/v1/models")[1]["data"]] == [ALIAS]


def test_a_repeated_prompt_is_reused_and_the_usage_says_so(engine: Path) -> None:
    ask(engine, "/v1/chat/completions", body=COLOURS)
    usage = ask(engine, "/v1/chat/completions", body=COLOURS)[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_a_prompt_beyond_the_context_is_refused_with_400(engine: Path) -> None:
    body = {**COLOURS, "messages": [{"role": "user", "content": "word " * 400}]}
    status, answer = ask(engine, "/v1/chat/completions", body=body)
    assert (status, answer["error"]["type"]) == (400, "exceed_context_size_error")
    assert answer["error"]["n_ctx"] == 256


def test_an_answer_ends_with_length_where_the_context_ends(engine: Path) -> None:
    answer = ask(engine, "/v1/chat/completions", body={**COLOURS, "max_tokens": 4000, "ignore_eos": True})[1]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 256


def test_a_json_schema_binds_the_answer(engine: Path) -> None:
    schema = {"type": "object", "properties": {"tone": {"enum": ["good", "bad"]}}, "required": ["tone"]}
    form = {"type": "json_schema", "json_schema": {"name": "tone", "schema": schema, "strict": True}}
    answer = ask(engine, "/v1/chat/completions", body={**COLOURS, "max_tokens": 64, "response_format": form})[1]
    assert json.loads(answer["choices"][0]["message"]["content"])["tone"] in {"good", "bad"}


def test_a_json_schema_with_a_dangling_reference_is_refused_with_400(engine: Path) -> None:
    schema = {"type": "object", "properties": {"tone": {"$ref": "#/nowhere"}}}
    form = {"type": "json_schema", "json_schema": {"name": "tone", "schema": schema}}
    assert ask(engine, "/v1/chat/completions", body={**COLOURS, "response_format": form})[0] == 400


def test_seed_stop_n_and_logprobs_are_honoured(engine: Path) -> None:
    warm = {**COLOURS, "temperature": 1, "seed": 7}
    first, second = (ask(engine, "/v1/chat/completions", body=warm)[1]["choices"][0] for _ in range(2))
    assert first["message"]["content"] == second["message"]["content"]
    body = {**COLOURS, "n": 2, "logprobs": True, "top_logprobs": 2}
    choices = ask(engine, "/v1/chat/completions", body=body)[1]["choices"]
    assert len(choices) == 2
    assert len(choices[0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    text = choices[0]["message"]["content"]
    stopped = ask(engine, "/v1/chat/completions", body={**COLOURS, "stop": [text[3:6]]})[1]["choices"][0]
    assert (stopped["finish_reason"], stopped["message"]["content"]) == ("stop", text[:3])


def test_more_requests_than_slots_wait_and_the_metrics_count_them(engine: Path) -> None:
    before = counter(engine, "tokens_predicted_total")

    async def chat_all() -> list[int]:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(engine))) as session:

            async def chat(number: int) -> int:
                messages = [{"role": "user", "content": f"Count from {number}."}]
                body = {**COLOURS, "messages": messages, "ignore_eos": True}
                async with session.post("http://engine/v1/chat/completions", json=body) as response:
                    return int((await response.json())["usage"]["completion_tokens"])

            return await asyncio.gather(*(chat(number) for number in range(6)))

    assert asyncio.run(chat_all()) == [8] * 6
    assert counter(engine, "tokens_predicted_total") - before == 48
    assert counter(engine, "requests_processing") == counter(engine, "requests_deferred") == 0
    assert counter(engine, "n_busy_slots_per_decode") > 1


def test_health_is_503_while_loading_and_sigterm_ends_it_quietly_amid_requests(checkpoint: Path, folder: Path) -> None:
    uds = folder / "engine.sock"
    server = start(checkpoint, "--uds", str(uds), "--slots", "1")
    assert wait_until_healthy(server, uds) == {503, 200}
    assert uds.stat().st_mode & 0o077 == 0
    long = {**COLOURS, "max_tokens": 2000, "ignore_eos": True}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(uds))
        payload = json.dumps(long).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: engine\r\nContent-Length: {len(payload)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
        while counter(uds, "requests_processing") == 0 or not catches_sigterm(server):
            assert server.poll() is None
        assert stop(server) == (0, "")
    assert not uds.exists()


def test_the_socket_of_a_killed_server_is_replaced_and_that_of_a_living_one_is_not(
    checkpoint: Path, folder: Path
) -> None:
    uds = folder / "engine.sock"
    killed = start(checkpoint, "--uds", str(uds))
    wait_until_healthy(killed, uds)
    killed.kill()
    killed.communicate()
    server = start(checkpoint, "--uds", str(uds))
    wait_until_healthy(server, uds)
    second = start(checkpoint, "--uds", str(uds))
    assert "another server listens" in second.communicate()[0].decode()
    assert second.returncode == 2
    assert stop(server)[0] == 0


def test_a_checkpoint_that_is_none_ends_with_a_message_and_status_2(folder: Path) -> None:
    broken = folder / "broken.gguf"
    broken.write_text("no checkpoint")
    for path, said in ((broken, "invalid magic"), (folder / "absent.gguf", "no checkpoint at")):
        server = start(path, "--uds", str(folder / "engine.sock"))
        assert said in server.communicate()[0].decode()
        assert server.returncode == 2


def test_embeddings_come_as_base64_floats_of_length_one(checkpoint: Path, folder: Path) -> None:
    uds = folder / "engine.sock"
    server = start(checkpoint, "--uds", str(uds), "--embeddings", "--slots", "2", "--context-per-slot", "128")
    wait_until_healthy(server, uds)
    body = {"model": ALIAS, "input": ["red", "a blue one", "green"], "encoding_format": "base64"}
    status, answer = ask(uds, "/v1/embeddings", body=body)
    assert (status, [entry["index"] for entry in answer["data"]]) == (200, [0, 1, 2])
    packed = base64.b64decode(answer["data"][1]["embedding"])
    vector = struct.unpack(f"<{len(packed) // 4}f", packed)
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-3)
    status, answer = ask(uds, "/v1/embeddings", body={"model": ALIAS, "input": "word " * 400})
    assert (status, "too large" in answer["error"]["message"]) == (
        500,
        True,
    )  # llama.cpp's own choice of status
    assert stop(server)[0] == 0
