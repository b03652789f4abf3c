"""Single requests through a real gateway, RabbitMQ and a worker's express node."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

from models.states import Scope
from pipeline.keys import issue_key
from store.database import Database
from tests.support.gateway_process import GatewayProcess
from tests.support.processes import WorkerProcess
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until


def posted(text: str, *, key: str) -> bytes:
    body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_request_ends_with_its_client_and_is_answered_by_the_next_node_when_one_is_killed(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, database: Database
) -> None:
    with database.transaction() as session:
        key = issue_key(session, tenant="local", name="one", scopes=(Scope.SUBMIT, Scope.READ)).key

    def ask(url: str, text: str) -> str:
        body = {"model": "scripted", "messages": [{"role": "user", "content": text}]}
        headers = {"Authorization": f"Bearer {key.text}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            said: dict[str, Any] = json.load(answer)
        content: str = said["choices"][0]["message"]["content"]
        return content

    express_env = env | {"STOKER_WORKER__EXPRESS_SLOTS": "2"}
    with (
        WorkerProcess("one", env=express_env, folder=tmp_path) as worker,
        GatewayProcess(env=env, folder=tmp_path) as gateway,
    ):
        wait_until(lambda: "express-one@" in worker.log and "ready." in worker.log.split("express-one@")[-1], 60, "up")
        assert ask(gateway.url, "hello") == "echo: hello"

        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.sendall(posted("[[latency 60]] never mind", key=key.text))
            wait_until(lambda: endpoint.calls().running == 1, 10, "the engine has it")
        wait_until(lambda: endpoint.calls().running == 0, 10, "the engine is told that nobody waits")

        nodes = [found.pid for found in worker.processes() if "worker.express" in found.command]
        [child] = [found.pid for found in worker.processes() if found.parent in nodes]
        said: list[str] = []
        asking = threading.Thread(target=lambda: said.append(ask(gateway.url, "[[latency 3]] again")))
        asking.start()
        wait_until(lambda: endpoint.calls().count == 3, 10, "the engine has it")
        os.kill(child, signal.SIGKILL)
        asking.join(30)

        assert said == ["echo: [[latency 3]] again"]
        assert endpoint.calls().count == 4
        worker.kill9()
        wait_until(lambda: not worker.processes(), 20, "its node went with the worker")
