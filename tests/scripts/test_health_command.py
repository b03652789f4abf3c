"""`stoker health` as a container's healthcheck asks it."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from runtime.errors import ServiceUnreachable
from runtime.settings import Settings
from scripts.health_command import health
from store.notifications import Leadership
from store.presence import PresenceBoard, WorkerPresence

NOWHERE = Settings.model_validate(
    {
        "postgres": {"url": "postgresql://nobody@127.0.0.1:1/none"},
        "broker": {"url": "amqp://127.0.0.1:1"},
        "redis": {"url": "redis://127.0.0.1:1/0"},
        "gateway": {"port": 1},
        "flower": {"port": 1},
    }
)


def told(part: str, **groups: Any) -> tuple[int, str]:
    """The exit code and what is said. Raises what `stoker` turns into its exit code."""
    groups.setdefault("worker", {"node": "documents"})
    changed = {name: getattr(NOWHERE, name).model_copy(update=fields) for name, fields in groups.items()}
    result = CliRunner().invoke(health, [part], obj=NOWHERE.model_copy(update=changed), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.stderr


def test_a_worker_is_healthy_once_this_machines_own_says_so(redis_url: str) -> None:
    board, machine = PresenceBoard(redis_url), os.uname().nodename
    seen = []
    for name, node, is_healthy in (
        ("celery@elsewhere", "documents", True),
        (f"control@{machine}", "control", True),
        (f"celery@{machine}", "documents", False),
        (f"celery@{machine}", "documents", True),
    ):
        board.announce(WorkerPresence(name=name, node=node, children=1, models=[], engine="vllm", healthy=is_healthy))
        seen.append(told("worker", redis={"url": redis_url}))
    board.close()

    assert [code for code, _ in seen] == [1, 1, 1, 0]
    assert "no worker of the node documents" in seen[0][1] and "engine" in seen[2][1] and seen[3][1] == ""


def test_dispatch_is_healthy_while_somebody_leads(postgres_url: str) -> None:
    assert told("dispatch", postgres={"url": postgres_url})[0] == 1

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        assert Leadership(connection).acquire(silent_s=60)
        assert told("dispatch", postgres={"url": postgres_url}) == (0, "")


@pytest.mark.parametrize("part", ["worker", "dispatch"])
def test_a_service_that_does_not_answer_is_said_apart(part: str) -> None:
    with pytest.raises(ServiceUnreachable):
        told(part)


@pytest.mark.parametrize(("part", "path"), [("gateway", "/healthz"), ("flower", "/healthcheck")])
def test_a_server_is_healthy_when_it_says_so(part: str, path: str) -> None:
    with server(path, 200) as port:
        assert told(part, **{part: {"host": "0.0.0.0", "port": port}}) == (0, "")
    with server(path, 500) as port:
        assert told(part, **{part: {"port": port}})[0] == 1
    assert told(part)[0] == 1


def test_a_gateway_that_reaches_no_postgres_is_told_apart() -> None:
    with server("/healthz", 503) as port, pytest.raises(ServiceUnreachable, match="Postgres"):
        told("gateway", gateway={"port": port})


@contextmanager
def server(path: str, status: int) -> Iterator[int]:
    """The port of a server that answers so there, and 404 elsewhere."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == path else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield serving.server_port
        finally:
            serving.shutdown()
            thread.join()
