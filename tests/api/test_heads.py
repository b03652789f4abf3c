"""What anybody who reaches the port may send before there is a key: bare sockets at a gateway's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from api.connections import HEAD_BYTES, BoundedHeads
from store.database import Database
from tests.support.gateway_process import GatewayProcess
from tests.support.waiting import wait_until

SENT_AT_ONCE = 65_536
MOST_SENT = 16 * 1024 * 1024
HEAD = b"POST /v1/batches HTTP/1.1\r\nHost: gateway\r\n"


@pytest.fixture
def gateway(database: Database, postgres_url: str, redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    env = {"STOKER_POSTGRES__URL": postgres_url, "STOKER_BROKER__URL": "memory://", "STOKER_REDIS__URL": redis_url}
    with GatewayProcess(env=env | {"STOKER_HOME": str(tmp_path)}, folder=tmp_path) as started:
        yield started


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def test_a_head_that_does_not_end_is_cut_off(gateway: GatewayProcess) -> None:
    for begin, endless in (
        (HEAD + b"x-long: ", b"x" * SENT_AT_ONCE),
        (HEAD, b"x-short: 1\r\n" * (SENT_AT_ONCE // 12)),
        (b"GET /", b"x" * SENT_AT_ONCE),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x-trailer: 1\r\n" * (SENT_AT_ONCE // 14)),
    ):
        assert sent_until_cut(gateway.port, begin, endless) < MOST_SENT, begin
    with connected(gateway.port) as other:
        other.sendall(b"GET /healthz HTTP/1.1\r\nHost: gateway\r\nx-long: " + b"x" * (HEAD_BYTES // 2) + b"\r\n\r\n")
        assert other.recv(64).startswith(b"HTTP/1.1 200"), "a long one is heard"


def test_a_connection_that_says_nothing_or_half_a_head_is_closed() -> None:
    class Hasty(BoundedHeads):
        head_s = 1.0

    with served_by(Hasty) as port, connected(port) as silent, connected(port) as half, connected(port) as again:
        began = time.monotonic()
        half.sendall(HEAD)
        again.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert again.recv(4096).startswith(b"HTTP/1.1 404")
        again.sendall(b"\r\n" + HEAD)
        assert [one.recv(4096) for one in (silent, half, again)] == [b"", b"", b""]
        assert 0.5 < time.monotonic() - began < 8


def test_a_body_after_its_answer_has_a_time_of_its_own_and_the_connection_stays() -> None:
    class Hasty(BoundedHeads):
        head_s = 0.5
        rest_s = 2.0

    post, get = (f"{method} / HTTP/1.1\r\nHost: here\r\n".encode() for method in ("POST", "GET"))
    with served_by(Hasty) as port, connected(port) as late, connected(port) as endless, connected(port) as half:
        began = time.monotonic()
        for one in (late, endless):
            one.sendall(post + b"content-length: 4\r\n\r\nab")
            assert one.recv(4096).startswith(b"HTTP/1.1 404")
        half.sendall(get + b"\r\n" + get)
        assert half.recv(4096).startswith(b"HTTP/1.1 404")
        assert half.recv(4096) == b"", "half a head that came before the answer to another"
        time.sleep(0.7)
        late.sendall(b"cd")
        time.sleep(0.7)
        late.sendall(get + b"\r\n")
        assert late.recv(4096).startswith(b"HTTP/1.1 404"), "neither the rest nor idleness has the head's time"
        assert endless.recv(4096) == b""
        assert time.monotonic() - began < 4.5, "uvicorn's own time is 5 s"


@contextmanager
def served_by(protocol: type[BoundedHeads]) -> Iterator[int]:
    """The port of an application without routes."""
    server = uvicorn.Server(uvicorn.Config(FastAPI(), port=0, http=protocol, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 10, "uvicorn serves")
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def sent_until_cut(port: int, begin: bytes, endless: bytes) -> int:
    """The bytes that went out before the gateway closed the connection."""
    sent = 0
    with connected(port) as client:
        try:
            client.sendall(begin)
            while sent < MOST_SENT:
                client.sendall(endless)
                sent += len(endless)
        except (BrokenPipeError, ConnectionResetError):
            return sent
    return sent
