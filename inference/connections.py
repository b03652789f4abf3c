"""HTTP/1.1 over kept connections: a request, and its whole answer as bytes, for the running loop.

On the job path this is where a worker's time goes, so it does what an Endpoint needs and no more: one request at a
time on a connection, no redirects, cookies, proxies or compression. httptools parses (llhttp, as in uvicorn); reasons
and figures are in docs/decisions/0017. It must not retry, and must not know what a body or a status means.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from dataclasses import dataclass
from typing import cast

from aiohappyeyeballs import AddrInfoType, start_connection
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

CONNECT_TIMEOUT_S = 10.0
NEXT_ADDRESS_S = 0.25  # until a host's next address is tried too (RFC 8305, section 8)
# Below the 5 s after which uvicorn, vLLM's server, closes an idle connection: else a request may go out on
# a connection that is being closed, and look like a dead server.
KEEPALIVE_S = 4.0
# llama.cpp closes the connection after an answer in pieces, though it says keep-alive (measured: within milliseconds).
SETTLED_S = 0.2
HEAD_LIMIT_BYTES = 64 * 1024
STREAM_END = b"\ndata: [DONE]"  # no JSON has a bare line feed inside a text
ONE_WRITE_BYTES = 64 * 1024  # a larger body is not copied behind its head


class ConnectFailed(OSError):
    """No connection was made: the request cannot have run."""


class ConnectionBroken(OSError):
    """The connection ended before the answer did."""


class Silent(OSError):
    """Nothing came for longer than there was patience."""


class NotHttp(ValueError):
    """What came is no HTTP/1.1."""


class TooLarge(ValueError):
    """The body is over the limit; it was not read further."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a unix socket, or a host and port. `prefix` goes before every path."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    socket: str | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """With an answer that comes in pieces: how long there may be silence before its body's first byte, and after it."""

    first_byte_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names and values as they came."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of this header, whatever its case."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for found, value in self.headers if found.lower() == wanted), None)


class Connections:
    """Connections to one server, kept while they are used: made at need, as many as there are requests at once.

    Cancelling a request, or its timeout, closes its connection, which makes the server abort it.
    """

    def __init__(self, address: Address, *, headers: dict[str, str], body_limit_bytes: int) -> None:
        """`headers` go out with every request; ValueError if one of them would break it."""
        self._address = address
        self._body_limit_bytes = body_limit_bytes
        host = f"[{address.host}]" if ":" in address.host else address.host
        host = host if address.port in (0, 443 if address.tls else 80) else f"{host}:{address.port}"
        self._head = _head_of({"Host": host, **headers})
        self._idle: deque[_Connection] = deque()
        self._keeps_after_streams = False
        self._tls = ssl.create_default_context() if address.tls else None

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float,
        request_id: str = "",
        patience: Patience | None = None,
    ) -> Answer:
        """Send and wait for the whole answer.

        Raises ConnectFailed, ConnectionBroken, NotHttp, TooLarge, TimeoutError when the whole answer is not there so
        long after a connection was, or Silent where there is `patience`. With it the answer is taken for a stream: that
        it says `[DONE]` is its end too.
        """
        connection = self._kept() or await self._connected()
        extra = f"X-Request-Id: {request_id}\r\n" if request_id else ""
        start = (
            f"{method} {self._address.prefix}{path} HTTP/1.1\r\n{self._head}{extra}Content-Length: {len(body)}\r\n\r\n"
        )
        answer = connection.ask(start.encode("latin-1"), body)
        timer = connection.loop.call_later(timeout_s, connection.fail, TimeoutError())
        if patience is not None:
            connection.watch(patience)
        try:
            whole = await answer
        except BaseException:
            connection.abort()
            raise
        finally:
            timer.cancel()
            if patience is not None:
                connection.unwatch()
        self._keep(connection)
        return whole

    async def close(self) -> None:
        """Close the kept connections."""
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)  # for what the loop does at their end

    def _keep(self, connection: _Connection) -> None:
        """Keep it for the next request, and let those go that were kept in vain."""
        if connection.is_open:
            connection.rest()
            self._idle.append(connection)
        else:
            connection.abort()
        while self._idle and not self._idle[0].is_fresh:
            self._idle.popleft().abort()

    def _kept(self) -> _Connection | None:
        """The one that was used last, so that those beyond the need grow old.

        After an answer in pieces none is used again before one has been seen to stay open.
        """
        while self._idle and not self._idle[0].is_open:
            self._idle.popleft().abort()
        if self._idle and self._idle[0].has_outlived_a_stream:
            self._keeps_after_streams = True
        while self._idle:
            if self._idle[-1].is_fresh and self._idle[-1].has_streamed and not self._keeps_after_streams:
                return None
            connection = self._idle.pop()
            if connection.is_fresh:
                return connection
            connection.abort()
        return None

    async def _connected(self) -> _Connection:
        loop, address = asyncio.get_running_loop(), self._address

        def protocol() -> _Connection:
            return _Connection(loop, self._body_limit_bytes)

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if address.socket is not None:
                    _, connection = await loop.create_unix_connection(protocol, address.socket)
                else:
                    found = await addresses_of(address.host, address.port)
                    connected = await start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS_S)
                    name = address.host if address.tls else None
                    _, connection = await loop.create_connection(
                        protocol, sock=connected, ssl=self._tls, server_hostname=name
                    )
        except TimeoutError as error:
            raise ConnectFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
        except (OSError, UnicodeError, RuntimeError) as error:  # a host that is no name; uvloop's, of aiohappyeyeballs
            raise ConnectFailed(str(error)) from error
        return connection


async def addresses_of(host: str, port: int) -> list[AddrInfoType]:
    """Where the host's server may listen, in the order of preference; OSError if the name is not known."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(found)


def _head_of(headers: dict[str, str]) -> str:
    for name, value in headers.items():
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"the header {name} has characters that none may have")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


class _Connection(asyncio.Protocol):
    """One connection; `ask` begins an exchange, whose future the parser's callbacks end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, body_limit_bytes: int) -> None:
        self.loop = loop
        self.is_reusable = True
        self.has_streamed = False
        self._body_limit_bytes = body_limit_bytes
        self._parser = HttpResponseParser(self)
        self._idle_since = 0.0
        self._patience: Patience | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._begin()

    def _begin(self, answer: asyncio.Future[Answer] | None = None) -> None:
        self._answer = answer
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._raw_bytes = self._size_bytes = 0
        self._has_head = False

    @property
    def is_open(self) -> bool:
        """Whether another request may go out on it; not behind one that was answered before it was all sent."""
        return self.is_reusable and not self._transport.is_closing() and not self._transport.get_write_buffer_size()

    @property
    def is_fresh(self) -> bool:
        """Whether another request may go out on it now, after it rested."""
        return self.is_open and self.loop.time() - self._idle_since < KEEPALIVE_S

    @property
    def has_outlived_a_stream(self) -> bool:
        """Whether it is open a while after an answer in pieces."""
        return self.has_streamed and self.is_open and self.loop.time() - self._idle_since >= SETTLED_S

    def ask(self, head: bytes, body: bytes) -> asyncio.Future[Answer]:
        """Send a request; the future has its whole answer, or why there is none."""
        answer: asyncio.Future[Answer] = self.loop.create_future()
        self._begin(answer)
        self.has_streamed = False
        if len(body) < ONE_WRITE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        return answer

    def watch(self, patience: Patience) -> None:
        """From now on, until `unwatch`, silence ends the exchange."""
        self._patience = patience
        self.has_streamed = True
        self._heard_at = self.loop.time()
        self._watch = self.loop.call_later(patience.first_byte_s, self._look)

    def unwatch(self) -> None:
        """Silence means nothing any more."""
        self._patience = None
        if self._watch is not None:
            self._watch.cancel()

    def _look(self) -> None:
        """End an exchange that has been silent for too long, or look again when it could be."""
        if self._patience is None or self._answer is None or self._answer.done():
            return
        patience_s = self._patience.idle_s if self._parts else self._patience.first_byte_s
        left_s = self._heard_at + patience_s - self.loop.time()
        if self._watch is not None:
            self._watch.cancel()
        if left_s > 0:
            self._watch = self.loop.call_later(left_s, self._look)
            return
        if not self._ended_by_its_own_words():
            what = "no more of the answer" if self._parts else "no first byte of an answer"
            self._end(Silent(f"{what} within {patience_s:g} s"))
        self.abort()

    def _ended_by_its_own_words(self) -> bool:
        """Take a stream for whole that has said so, though its connection goes on or breaks."""
        if self._patience is None or STREAM_END not in b"".join(self._parts[-4:]):
            return False
        self.is_reusable = False
        self.on_message_complete()
        return True

    def rest(self) -> None:
        """It is idle from now on, and keeps nothing of the last answer."""
        self._begin()
        self._idle_since = self.loop.time()

    def fail(self, error: Exception) -> None:
        """End the exchange and the connection."""
        self._end(error)
        self.abort()

    def abort(self) -> None:
        """Close it now."""
        self.is_reusable = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.fail(NotHttp(str(error) or type(error).__name__))
            return
        self._raw_bytes += len(data)
        if self._raw_bytes > HEAD_LIMIT_BYTES + 8 * self._size_bytes:  # the smallest chunk is six bytes for one
            self.fail(NotHttp(f"headers or trailers of more than {HEAD_LIMIT_BYTES // 1024} KB"))

    def eof_received(self) -> None:
        self.is_reusable = False  # the end of the connection follows a turn of the loop later

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if exc is None and self._has_head and self._ends_with_the_connection:
            self.on_message_complete()
        self._ended_by_its_own_words()
        self._end(ConnectionBroken(str(exc) if exc else "the server closed the connection"))

    # What the parser finds.

    def on_message_begin(self) -> None:
        if self._answer is not None and self._answer.done():
            self.is_reusable = False  # what follows a whole answer must not become the next one's beginning

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # trailers say nothing that is asked
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if 100 <= self._status < 200:  # an interim answer, such as 100 Continue
            return
        self._has_head = True
        self.is_reusable = self.is_reusable and self._parser.should_keep_alive()
        codings = b", ".join(self._said(b"transfer-encoding"))
        if self._status < 100:
            self.fail(NotHttp(f"a status of {self._status}"))
        elif codings.strip().lower() not in (b"", b"chunked"):  # we asked for none, and the parser undoes no other
            self.fail(NotHttp(f"the transfer coding {codings.decode('latin-1')}"))
        elif any(int(length) > self._body_limit_bytes for length in self._said(b"content-length")):  # numbers: parsed
            self.fail(TooLarge())

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._size_bytes += len(body)
        if self._patience is not None:
            self._heard_at = self.loop.time()
            if len(self._parts) == 1:  # from now on the other patience counts, which may be the shorter one
                self._look()
        if self._size_bytes > self._body_limit_bytes:
            self.fail(TooLarge())

    def on_message_complete(self) -> None:
        if not self._has_head:
            self._headers = []
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._status, self._headers, b"".join(self._parts)))

    @property
    def _ends_with_the_connection(self) -> bool:
        return not (self._said(b"content-length") or self._said(b"transfer-encoding"))

    def _said(self, wanted: bytes) -> list[bytes]:
        return [value for name, value in self._headers if name.lower() == wanted]

    def _end(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
