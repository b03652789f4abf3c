"""What servers may do on a connection, byte by byte."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme
import uvloop

from inference import connections
from inference.connections import (
    CONNECT_TIMEOUT_S,
    Address,
    Answer,
    ConnectFailed,
    ConnectionBroken,
    Connections,
    NotHttp,
    TooLarge,
)

T = TypeVar("T")
Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


Certified = Callable[[bool], dict[str, Any]]


@pytest.fixture
def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certified:
    """What `with_server` takes for a server with a certificate that we trust, or for one without TLS."""

    def arguments(secure: bool) -> dict[str, Any]:
        if not secure:
            return {}
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost").configure_cert(context)
        return {"tls": context, "host": "localhost"}

    return arguments


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """(head, body) of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


def saying(*answers: bytes, then_close: bool = False) -> Served:
    """A server that gives these answers on each connection, whatever is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await read_request(reader)
            writer.write(answer)
        if then_close:
            await writer.drain()
            writer.close()
        else:
            await reader.read()

    return serve


def with_server(
    serve: Served,
    work: Callable[[Connections], Awaitable[T]],
    *,
    limit_bytes: int = 1000,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> T:
    """What `work` gives over connections to a server of its own; `serve` runs once for each connection."""

    async def run() -> T:
        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=tls)
        address = Address(host=host, port=server.sockets[0].getsockname()[1], tls=tls is not None)
        pool = Connections(address, headers={"User-Agent": "stoker"}, body_limit_bytes=limit_bytes)
        try:
            return await work(pool)
        finally:
            await pool.close()
            server.close()

    return uvloop.run(run())


def answering(found: T) -> Callable[..., Awaitable[T]]:
    """A coroutine function that gives this, whatever it is asked."""

    async def answer(*_: Any) -> T:
        return found

    return answer


async def ask(pool: Connections, body: bytes = b"{}") -> Answer:
    return await pool.request("POST", "/v1/x", body, timeout_s=5.0, request_id="r-1")


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:   2\r\n\r\nok",
    ],
)
def test_whole_answers_of_several_forms(answer: bytes) -> None:
    whole = with_server(saying(answer), ask)

    assert (whole.status, whole.body) == (200, b"ok")


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_a_body_without_a_length_ends_with_the_connection(head: bytes) -> None:
    assert with_server(saying(head + b"all of it", then_close=True), ask).body == b"all of it"


def test_an_answer_may_come_byte_by_byte() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for byte in OK:
            writer.write(bytes([byte]))
            await writer.drain()
        await reader.read()

    assert with_server(serve, ask).body == b"ok"


def test_headers_are_found_whatever_their_case_and_the_first_counts() -> None:
    answer = b"HTTP/1.1 429 No\r\nRETRY-after: 7\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n"

    found = with_server(saying(answer), ask)

    assert found.header("Retry-After") == "7"
    assert found.header("x-none") is None


@pytest.mark.parametrize("secure", [False, True])
def test_a_connection_is_used_again_and_each_answer_is_its_own(certified: Certified, secure: bool) -> None:
    async def work(pool: Connections) -> list[bytes]:
        return [(await ask(pool)).body for _ in range(3)]

    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % n for n in range(3)]

    assert with_server(saying(*answers), work, **certified(secure)) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("how", ["cancelled", "timeout"])
def test_the_late_answer_to_a_request_that_was_given_up_is_nobodys(
    certified: Certified, secure: bool, how: str
) -> None:
    given_up = asyncio.Event()
    made: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append(1)
        await read_request(reader)
        if len(made) == 1:
            await given_up.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
        else:
            writer.write(OK)
        await reader.read()

    async def work(pool: Connections) -> bytes:
        try:
            async with asyncio.timeout(0.2 if how == "cancelled" else 5.0):
                await pool.request("POST", "/v1/x", timeout_s=0.2 if how == "timeout" else 5.0)
        except TimeoutError:
            given_up.set()
        return (await ask(pool)).body

    assert with_server(serve, work, **certified(secure)) == b"ok"
    assert len(made) == 2


@pytest.mark.parametrize(
    "first", [OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), OK.replace(b"HTTP/1.1", b"HTTP/1.0")]
)
def test_a_connection_that_the_server_will_close_is_not_used_again(first: bytes) -> None:
    async def work(pool: Connections) -> list[bytes]:
        return [(await ask(pool)).body for _ in range(2)]

    assert with_server(saying(first), work) == [b"ok", b"ok"]


def test_what_nobody_asked_for_spoils_a_kept_connection_and_no_answer() -> None:
    async def work(pool: Connections) -> list[bytes]:
        first = await ask(pool)
        await asyncio.sleep(0.05)
        return [first.body, (await ask(pool)).body]

    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"

    assert with_server(saying(OK + stray, OK), work) == [b"ok", b"ok"]


def test_a_connection_that_was_idle_too_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE_S", 0.0)
    made = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append(1)
        await saying(OK)(reader, writer)

    async def work(pool: Connections) -> list[bytes]:
        return [(await ask(pool)).body for _ in range(3)]

    assert with_server(serve, work) == [b"ok"] * 3
    assert len(made) == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example.org ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 099 What\r\nContent-Length: 2\r\n\r\nno" + OK,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\nPRI",
    ],
)
def test_what_is_no_http_is_said_so(answer: bytes) -> None:
    with pytest.raises(NotHttp):
        with_server(saying(answer), ask)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
def test_an_answer_that_breaks_off_is_a_broken_connection(answer: bytes) -> None:
    with pytest.raises(ConnectionBroken):
        with_server(saying(answer, then_close=True), ask)


@pytest.mark.parametrize(
    "head", [b"Content-Length: 1001\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001]
)
def test_a_body_over_the_limit_is_not_read_to_its_end(head: bytes) -> None:
    with pytest.raises(TooLarge):
        with_server(saying(b"HTTP/1.1 200 OK\r\n" + head), ask)


def test_a_request_has_its_headers_its_name_and_its_body_whole() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(OK)
        await reader.read()

    large = bytes(range(256)) * 4096
    with_server(serve, lambda pool: ask(pool, large))

    head, body = seen[0]
    assert head.startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nUser-Agent: stoker\r\n" in head
    assert b"\r\nX-Request-Id: r-1\r\n" in head
    assert body == large


def test_a_silent_server_is_left_after_the_time_and_a_missing_one_at_once() -> None:
    async def impatient(pool: Connections) -> Answer:
        return await pool.request("GET", "/", timeout_s=0.05)

    with pytest.raises(TimeoutError):
        with_server(saying(b""), impatient)
    with pytest.raises(ConnectFailed):
        uvloop.run(ask(Connections(Address(host="127.0.0.1", port=9), headers={}, body_limit_bytes=1)))
    with pytest.raises(ConnectFailed):
        uvloop.run(ask(Connections(Address(host="a..b", port=80), headers={}, body_limit_bytes=1)))


@pytest.mark.parametrize("secure", [False, True])
def test_a_server_that_closes_after_each_answer_costs_no_request(certified: Certified, secure: bool) -> None:
    async def work(pool: Connections) -> list[bytes]:
        answers = []
        for _ in range(20):
            answers.append((await ask(pool)).body)
            while pool._idle and pool._idle[-1].is_fresh:  # what goes out before the server's end has come may be lost
                await asyncio.sleep(0.001)
        return answers

    assert with_server(saying(OK, then_close=True), work, **certified(secure)) == [b"ok"] * 20


def test_half_an_answer_behind_a_whole_one_is_not_the_next_ones_beginning() -> None:
    wrong = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nWRONG"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + wrong[:30])
        await read_request(reader)
        writer.write(wrong[30:])

    async def work(pool: Connections) -> list[bytes]:
        answers = [(await ask(pool)).body]
        for _ in range(2):
            try:
                answers.append((await ask(pool)).body)
            except ConnectionBroken:
                continue
        return answers

    assert b"WRONG" not in with_server(serve, work)


def test_trailers_are_bounded_and_are_no_headers() -> None:
    chunked = b"HTTP/1.1 429 No\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"

    few = with_server(saying(chunked + b"Retry-After: 9\r\n\r\n"), ask)

    assert (few.body, few.header("Retry-After")) == (b"x", None)
    with pytest.raises(NotHttp, match="trailers"):
        with_server(saying(chunked + b"X: y\r\n" * 100_000 + b"\r\n"), ask)


@pytest.mark.parametrize("value", ["a\r\nX: b", "a\nb", "é"])
def test_a_header_that_would_break_the_request_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="Authorization"):
        Connections(Address(host="h", port=1), headers={"Authorization": value}, body_limit_bytes=1)


def test_a_request_that_was_answered_before_it_was_all_sent_is_the_last_on_its_connection() -> None:
    asked: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(1)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await asyncio.sleep(1.0)

    async def work(pool: Connections) -> list[bytes]:
        return [(await ask(pool, b"x" * 50_000_000)).body, (await ask(pool)).body]

    assert with_server(serve, work) == [b"ok", b"ok"]
    assert len(asked) == 2


def test_connections_that_were_kept_in_vain_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE_S", 0.2)
    here: set[int] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.add(id(writer))
        try:
            while True:
                await read_request(reader)
                writer.write(OK)
        finally:
            here.discard(id(writer))

    async def work(pool: Connections) -> tuple[int, int]:
        await asyncio.gather(*(ask(pool) for _ in range(8)))
        at_most = len(here)
        async with asyncio.timeout(20):
            while len(here) > 1:
                await asyncio.sleep(0.05)
                await ask(pool)
        return at_most, len(pool._idle)

    assert with_server(serve, work) == (8, 1)


def test_a_kept_connection_holds_no_answer() -> None:
    body = b"held by nobody else"

    def answers_held() -> int:
        """By type(), for isinstance() asks the lazy proxies of other libraries who they are, which makes them."""
        return sum(type(found) is Answer and found.body == body for found in gc.get_objects())

    async def work(pool: Connections) -> tuple[int, int]:
        answer = await ask(pool)
        while_used = answers_held()
        del answer
        await asyncio.sleep(0)  # the turn of the loop that it came in holds it too
        gc.collect()
        return while_used, answers_held()

    served = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    assert with_server(saying(served), work) == (1, 0)


def test_an_address_that_is_silent_does_not_keep_the_next_one_from_being_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(pool: Connections) -> bytes:
        port = pool._address.port
        with socket.socket() as silent, socket.socket() as first:
            silent.bind(("127.0.0.2", port))
            silent.listen(0)
            first.connect(silent.getsockname())  # its queue is full: who comes now hears nothing
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
            monkeypatch.setattr(connections, "addresses_of", answering(found))
            return (await ask(pool)).body

    began = time.monotonic()
    assert with_server(saying(OK), work) == b"ok"
    assert time.monotonic() - began < CONNECT_TIMEOUT_S / 2


def test_a_failure_of_the_race_between_addresses_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_connection(*_: Any, **__: Any) -> None:
        raise RuntimeError("Socket is in use")

    monkeypatch.setattr(connections, "start_connection", start_connection)
    with pytest.raises(ConnectFailed, match="in use"):
        with_server(saying(OK), ask)


@pytest.mark.parametrize(
    ("host", "trusted", "reason"), [("127.0.0.1", True, "mismatch"), ("localhost", False, "issuer")]
)
def test_a_server_must_prove_its_name(
    certified: Certified,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    trusted: bool,
    reason: str,
) -> None:
    served = certified(True) | {"host": host}
    if not trusted:
        trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await read_request(reader))[0])
        writer.write(OK)
        await reader.read()

    with pytest.raises(ConnectFailed, match=reason):
        with_server(serve, ask, **served)
    assert not seen
