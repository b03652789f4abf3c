"""One OpenAI-compatible HTTP server: send a body, get a reply or an error that says what to do next.

It must not retry (the pipeline decides), look into bodies, or let a key into a message.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, NoReturn, Self
from urllib.parse import SplitResult, quote, urlsplit

import msgspec

from inference.bodies import addressed
from inference.connections import Address, Answer, ConnectFailed, Connections, NotHttp, Patience, Silent, TooLarge
from inference.rate_headers import rates_seen, retry_after_s
from inference.refusals import is_about_quota, is_about_the_key
from inference.streams import BrokenStream, is_stream, whole
from models.endpoints import RatesSeen
from runtime.errors import BadInput, Permanent, Transient

RESPONSE_LIMIT_BYTES = 256 * 1024 * 1024
# Chosen, not measured: a front end busy with hundreds of requests still answers in a second or two.
PROBE_TIMEOUT_S = 10.0
EXCERPT_CHARACTERS = 200
# A shorter key is a placeholder such as vLLM's EMPTY: no secret, and to blot it out would garble messages.
SECRET_CHARACTERS = 8
# 520 to 524 and 529 are what proxies in front of managed providers say for 502, 503 and 504.
TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
GATEWAY_STATUSES: Final = frozenset({502, 504, 520, 521, 522, 523, 524})
STREAMED_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
Auth = Literal["bearer", "api-key", "x-api-key"]
_PATHS: Final = ("/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")
_VERSION: Final = re.compile(r"/v\d[^/]*(/|$)")


class EndpointDown(Transient):
    """The server refused, reset or broke the connection: it may have died with all that was in flight.

    `was_sent` is false when no connection was made, so that the request cannot have run.
    """

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class Stalled(EndpointDown):
    """Nothing came for too long: no first byte, or no more of a stream. It may still be at work on it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, was_sent=True)


class ServerFault(Transient):
    """The server answered with a status of 500 or above: it may be dying."""

    def __init__(self, message: str, *, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status

    @property
    def may_have_run(self) -> bool:
        """Whether what stands before the server has given it up, which may still be at work on it."""
        return self.status in GATEWAY_STATUSES


class Throttled(Transient):
    """The server has had too many requests or tokens of ours (429); nothing ran. `seen`: what it says of its limits."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, seen: RatesSeen | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.seen = seen


class QuotaExhausted(Transient):
    """What our account may spend there is spent: nothing runs until somebody pays or a month ends."""


class Refused(Transient):
    """The server refuses our key, whatever is asked: another endpoint may do the job."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered for good: a success or a rejection, its body as it came.

    `seen`: what its headers say of limits. `engine_id`: whose answer it is where that is not the worker's own
    engine; `cost`: what a priced one asks for it, in nanos.
    """

    status_code: int
    body: bytes
    duration_ms: int
    seen: RatesSeen | None = None
    engine_id: int | None = None
    cost: int | None = None


class Endpoint:
    """An open connection pool to one server, for the running loop: `async with Endpoint(url, …) as endpoint`.

    `url` is `http(s)://host:port[/prefix][/v1]` or `unix:///path/to.sock`; a path with another version in it, as
    /v1beta/openai, is taken as it is. At most `connections` posts are under way at once; waiting for a free one does
    not count towards `timeout_s`, and probes never wait. Proxies and .netrc of the environment are not used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout_s: float,
        connections: int,
        auth: Auth = "bearer",
        streams: bool = False,
        first_byte_s: float | None = None,
        idle_s: float | None = None,
        is_shared: bool = False,
    ) -> None:
        """`auth` names the header of the key. Raise BadInput, without naming the URL's secrets, for another form of it.

        `streams`: answers come in pieces, so that silence shows: before the first byte `first_byte_s` at most, then
        `idle_s`; `timeout_s` is the end in any case. `is_shared`: it serves others too, and answers for its limits and
        our account: what it says of them is read, and a key that it refuses is not the job's fault.
        """
        self.url = url
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._patience = Patience(first_byte_s=first_byte_s or timeout_s, idle_s=idle_s or timeout_s)
        self._streams = streams
        self._is_shared = is_shared
        self._free = asyncio.Semaphore(connections)
        self._address = _address_of(url)
        self._is_versioned = bool(_VERSION.search(self._address.prefix))
        self._headers = {"User-Agent": "stoker", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key:
            name, value = ("Authorization", f"Bearer {api_key}") if auth == "bearer" else (auth, api_key)
            self._headers[name] = value
            if not (api_key.isascii() and api_key.isprintable()):
                raise BadInput("the endpoint's api_key has characters that no header may have")
        self._open: Connections | None = None

    async def __aenter__(self) -> Self:
        self._open = Connections(self._address, headers=self._headers, body_limit_bytes=RESPONSE_LIMIT_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connections.close()
        self._open = None

    async def post(self, path: str, body: bytes, *, request_id: str, model: str | None = None) -> Reply:
        """Send one job's body to `path` (`/v1/…`); return a success or a rejection (any other 3xx, 4xx, 5xx).

        `model` goes out instead of the body's own. A streamed answer comes back as one that is not.

        Raises Transient for a status that may pass, with the server's Retry-After (Throttled, QuotaExhausted,
        ServerFault; a shared endpoint's Refused); EndpointDown if the connection failed, Stalled if it fell silent;
        Permanent `timeout` or `response_too_large`. Cancelling it closes the connection, which makes the server abort
        the request.
        """
        streams = self._streams and path in STREAMED_PATHS
        if streams or model is not None:
            body = addressed(body, model=model, streams=streams)
        patience = self._patience if streams else None
        async with self._free:
            started = time.monotonic()
            answer = await self._ask(
                "POST", path, body, timeout_s=self._timeout_s, request_id=request_id, patience=patience
            )
        if streams and is_stream(answer):
            answer = self._whole(answer)
        content = answer.body
        seen = rates_seen(answer) if self._is_shared else None
        if answer.status >= 400:
            self._raise_for_status(answer, seen)
        if answer.status >= 300:
            content = self._without_key(content)
        return Reply(answer.status, content, round((time.monotonic() - started) * 1000), seen)

    async def is_healthy(self) -> bool:
        """Whether GET /health says 200, or /v1/models where there is no /health; False if nothing answers.

        Of a shared endpoint that has neither it is enough that it answers.
        """
        try:
            status, _ = await self._get("/health")
            if 400 <= status < 500:
                status, _ = await self._get("/v1/models")
        except (Transient, Permanent):
            return False
        return status == 200 or (self._is_shared and status in {404, 405})

    async def served_models(self) -> list[str]:
        """The names that jobs may use as `model`, in the server's order.

        Raises EndpointDown if nothing answers, Transient or Permanent if something else than a list does.
        """
        status, answer = await self._get("/v1/models")
        if status in TRANSIENT_STATUSES:
            raise Transient(f"{self.url}/v1/models answered {status}: {self._excerpt(answer)}")
        try:
            return [model.id for model in msgspec.json.decode(answer, type=_Models).data]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Permanent(
                f"{self.url}/v1/models answered {status}, not a list of models: {self._excerpt(answer)}",
                code="invalid_response",
            ) from error

    async def version(self) -> str | None:
        """What the server calls its version (vLLM, llama.cpp); None if it does not say.

        Raises EndpointDown if nothing answers.
        """
        for path in ("/version", "/props"):
            status, answer = await self._get(path)
            if status != 200:
                continue
            try:
                known = msgspec.json.decode(answer, type=_Version)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            if known.version or known.build_info:
                return known.version or known.build_info
        return None

    async def text(self, path: str) -> str:
        """What it says at `path`, such as /metrics; empty unless with status 200. Raises EndpointDown if it is down."""
        status, answer = await self._get(path)
        return answer.decode(errors="replace") if status == 200 else ""

    @property
    def _connections(self) -> Connections:
        if self._open is None:
            raise RuntimeError("an Endpoint is used inside `async with` only")
        return self._open

    async def _get(self, path: str) -> tuple[int, bytes]:
        answer = await self._ask("GET", path, b"", timeout_s=PROBE_TIMEOUT_S, request_id="")
        return answer.status, answer.body

    async def _ask(
        self,
        method: str,
        path: str,
        body: bytes,
        *,
        timeout_s: float,
        request_id: str,
        patience: Patience | None = None,
    ) -> Answer:
        connections = self._connections
        if self._is_versioned:
            path = path.removeprefix("/v1")
        try:
            return await connections.request(
                method, path, body, timeout_s=timeout_s, request_id=request_id, patience=patience
            )
        except TooLarge as error:
            raise Permanent(
                f"{self.url} answered with more than {RESPONSE_LIMIT_BYTES // 1024**2} MB", code="response_too_large"
            ) from error
        except (NotHttp, OSError) as error:
            self._raise_for(error, timeout_s=timeout_s)

    def _raise_for(self, error: NotHttp | OSError, *, timeout_s: float) -> NoReturn:
        if isinstance(error, TimeoutError):
            raise Permanent(f"{self.url} did not answer within {timeout_s:g} s", code="timeout") from error
        reason = self._excerpt(str(error).encode()) or type(error).__name__
        if isinstance(error, NotHttp):
            raise Transient(f"{self.url} does not speak HTTP: {reason}") from error
        if isinstance(error, Silent):
            raise Stalled(f"{self.url}: {reason}") from error
        raise EndpointDown(f"{self.url}: {reason}", was_sent=not isinstance(error, ConnectFailed)) from error

    def _whole(self, answer: Answer) -> Answer:
        """The answer that a stream amounts to; raises EndpointDown if it is none."""
        try:
            return whole(answer)
        except BrokenStream as error:
            raise EndpointDown(f"{self.url}: {self._excerpt(str(error).encode())}", was_sent=True) from error

    def _raise_for_status(self, answer: Answer, seen: RatesSeen | None) -> None:
        """Raise what a status says of the server or of our account there; return if it speaks of the request."""
        status = answer.status
        message = f"{self.url} answered {status}: {self._excerpt(answer.body)}"
        wish_s = retry_after_s(answer)
        if (self._is_shared or status == 429) and is_about_quota(status, answer.body):
            raise QuotaExhausted(message, retry_after_s=wish_s)
        if self._is_shared and is_about_the_key(status, answer.body):
            raise Refused(f"{message}; look at its api key", retry_after_s=wish_s)
        if status == 429:
            raise Throttled(message, retry_after_s=wish_s, seen=seen)
        if status in TRANSIENT_STATUSES:
            if status >= 500:
                raise ServerFault(message, status=status, retry_after_s=wish_s)
            raise Transient(message, retry_after_s=wish_s)

    def _excerpt(self, answer: bytes) -> str:
        text = self._without_key(answer)[: 4 * EXCERPT_CHARACTERS].decode(errors="replace")
        return " ".join(text.replace("\0", " ").split())[:EXCERPT_CHARACTERS]

    def _without_key(self, answer: bytes) -> bytes:
        if self._api_key is None or len(self._api_key) < SECRET_CHARACTERS:
            return answer
        return answer.replace(self._api_key.encode(), b"***")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Version(msgspec.Struct):
    version: str | None = None
    build_info: str | None = None


def _address_of(url: str) -> Address:
    """Where a URL points; the path that it ends with, but for /v1, is the prefix of every other."""
    try:
        parts = urlsplit(url)
        fault = _fault_of(parts)
    except ValueError as error:
        raise BadInput("the endpoint's URL is malformed; write http://host:port/v1") from error
    if fault is not None:
        raise BadInput(f"the endpoint's URL {fault}; write http://host:port/v1 or unix:///path/to.sock")
    if parts.scheme == "unix":
        return Address(host="localhost", port=0, socket=parts.path)
    is_tls = parts.scheme == "https"
    try:
        host = (parts.hostname or "").encode("idna").decode()
    except UnicodeError as error:
        raise BadInput("the endpoint's URL names no host that there can be; write http://host:port/v1") from error
    prefix = quote(parts.path.rstrip("/").removesuffix("/v1"), safe="/%:@!$&'()*+,;=~-._")
    return Address(host=host, port=parts.port or (443 if is_tls else 80), prefix=prefix, tls=is_tls)


def _fault_of(parts: SplitResult) -> str | None:
    if parts.username is not None or parts.password is not None:
        return "holds a user or password, which belongs into the endpoint's api_key"
    if parts.query or parts.fragment:
        return "has a query or fragment"
    if parts.scheme == "unix":
        return None if parts.path and not parts.netloc else "names no absolute path"
    return _fault_of_web(parts)


def _fault_of_web(parts: SplitResult) -> str | None:
    if parts.scheme not in {"http", "https"}:
        return "has neither http, https nor unix as its scheme"
    host = parts.hostname or " "
    if not host.isprintable() or " " in host or parts.port == 0:  # a port that is no number raises ValueError
        return "names no host or port that there can be"
    if parts.path.rstrip("/").endswith(_PATHS):
        return "ends with the path of one kind of request, which is added to it"
    return None
