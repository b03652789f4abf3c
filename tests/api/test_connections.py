"""What anybody who reaches the port may send before there is a key: a gateway's process and bare sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.connections import HEAD_BYTES, HEAD_S
from store.database import Database
from tests.support.gateway_process import GatewayProcess

SENT_AT_ONCE = 65_536
MOST_SENT = 16 * 1024 * 1024
HEAD = b"POST /v1/batches HTTP/1.1\r\nHost: gateway\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("connections")


@pytest.fixture
def gateway(database: Database, postgres_url: str, redis_url: str, folder: Path) -> Iterator[GatewayProcess]:
    env = {"STOKER_POSTGRES__URL": postgres_url, "STOKER_BROKER__URL": "memory://", "STOKER_REDIS__URL": redis_url}
    with GatewayProcess(env=env | {"STOKER_HOME": str(folder)}, folder=folder) as started:
        yield started


def connected(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=HEAD_S + 10)


def test_a_head_that_does_not_end_is_cut_off(gateway: GatewayProcess) -> None:
    for begin, endless in (
        (HEAD + b"x-long: ", b"x" * SENT_AT_ONCE),
        (HEAD, b"x-short: 1\r\n" * (SENT_AT_ONCE // 12)),
        (b"GET /", b"x" * SENT_AT_ONCE),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x-trailer: 1\r\n" * (SENT_AT_ONCE // 14)),
    ):
        assert sent_until_cut(gateway, begin, endless) < MOST_SENT, begin
    with connected(gateway) as other:
        other.sendall(b"GET /healthz HTTP/1.1\r\nHost: gateway\r\nx-long: " + b"x" * (HEAD_BYTES // 2) + b"\r\n\r\n")
        assert other.recv(64).startswith(b"HTTP/1.1 200"), "a long one is heard"


def test_a_connection_that_says_nothing_or_half_a_head_is_closed(gateway: GatewayProcess) -> None:
    began = time.monotonic()
    healthy = b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n"
    with connected(gateway) as silent, connected(gateway) as half, connected(gateway) as again:
        half.sendall(HEAD)
        again.sendall(healthy)
        assert again.recv(4096).startswith(b"HTTP/1.1 200")
        again.sendall(b"\r\n" + HEAD)
        assert [one.recv(4096) for one in (silent, half, again)] == [b"", b"", b""]
        assert HEAD_S - 1 < time.monotonic() - began < HEAD_S + 8


def sent_until_cut(gateway: GatewayProcess, begin: bytes, endless: bytes) -> int:
    """The bytes that went out before the gateway closed the connection."""
    sent = 0
    with connected(gateway) as client:
        try:
            client.sendall(begin)
            while sent < MOST_SENT:
                client.sendall(endless)
                sent += len(endless)
        except (BrokenPipeError, ConnectionResetError):
            return sent
    return sent
