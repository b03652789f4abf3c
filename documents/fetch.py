"""A document from a URL that a stranger wrote: from public addresses only, within bounds of bytes and time.

It must not use a proxy, cookies or credentials, ask for an address twice, or keep a connection.
"""

from __future__ import annotations

import http.client
import mimetypes
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import PurePath
from threading import Timer
from typing import Any, Final
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from runtime.errors import Permanent, Transient

Address = IPv4Address | IPv6Address
MOST_REDIRECTS: Final = 5
PART_BYTES: Final = 65_536
NAME_CHARS: Final = 200
_ANYTHING: Final = "application/octet-stream"
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_LATER: Final = (408, 425, 429)  # beside all from 500
_HEADERS: Final = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "stoker", "Connection": "close"}
_UNFIT: Final = re.compile(r"[\x00-\x20\x7f\\]")  # in a host's name: parsers differ about them
# An IPv4 address lies in its last 32 bits, and a translator on the way goes there.
_NAT64: Final = IPv6Network("64:ff9b::/96")
# Global by ipaddress's word, but tunnels to an address within, or local; 168.63.129.16 is Azure's own service.
_NEVER: Final = (
    *map(ip_network, ("2002::/16", "2001::/32", "::/96", "64:ff9b:1::/48", "fec0::/10")),
    *map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16")),
)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came, under which name, and from where after all redirects."""

    content: bytes
    name: str
    url: str


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public Internet; an IPv4 address within one of IPv6 counts as itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(address.packed[-4:]))
    return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER)


def fetch(url: str, *, most_bytes: int, timeout_s: float, is_allowed: Callable[[Address], bool] = is_public) -> Fetched:
    """The bytes at `url`, over HTTP or HTTPS.

    Every host on the way is resolved once, all its addresses must be allowed, and one of those is connected to.
    Raises Permanent `bad_url`, `private_address`, `fetch_failed` or `too_large`, and Transient for what may pass:
    no connection, `timeout_s` over, 408, 425, 429 and the 500s. Only a resolver that hangs can take longer.
    """
    end = time.monotonic() + timeout_s
    for _ in range(MOST_REDIRECTS + 1):
        target = _target(url)
        with _translated(target), _response(target, end, is_allowed) as response:
            if response.status in _REDIRECTS:
                url = urljoin(url, response.headers.get("Location", ""))
                continue
            _refuse_status(response, target)
            return Fetched(_body(response, target, end, most_bytes), _name(response, target), url)
    raise Permanent(
        f"{_shown(target)}: more than {MOST_REDIRECTS} redirects; give the address they lead to", code="fetch_failed"
    )


_Place = tuple[socket.AddressFamily, Any]


class _Connection(http.client.HTTPConnection):
    """To one of the addresses that were checked, whatever the host's name means by now."""

    def __init__(self, target: SplitResult, places: list[_Place], end: float) -> None:
        is_secure = target.scheme == "https"
        super().__init__(_host(target), target.port or (443 if is_secure else 80))
        self.default_port = 443 if is_secure else 80
        self._context = ssl.create_default_context() if is_secure else None
        self._places = places
        self._end = end

    def connect(self) -> None:
        """Connect to the first address that answers, and for HTTPS prove its name."""
        self.sock = self._connected()
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock.do_handshake()

    def abort(self) -> None:
        """End every wait for the other side, from another thread."""
        if self.sock is not None:
            try:
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
            except OSError:
                return

    def _connected(self) -> socket.socket:
        failure: OSError | None = None
        for family, place in self._places:
            opened = socket.socket(family, socket.SOCK_STREAM)
            try:
                opened.settimeout(_left(self._end))
                opened.connect(place)
            except OSError as error:
                opened.close()
                failure = error
            else:
                return opened
        raise failure or OSError("no address")


def _target(url: str) -> SplitResult:
    try:
        target = urlsplit(url)
        port = target.port
        host = _host(target)
    except ValueError as error:
        raise Permanent(f"{url[:NAME_CHARS]!r} is no URL: {error}; correct it", code="bad_url") from error
    if target.scheme not in ("http", "https") or not host or port == 0 or _UNFIT.search(target.netloc):
        raise Permanent(f"{url[:NAME_CHARS]!r} is no http or https URL with a host; correct it", code="bad_url")
    if target.username is not None or target.password is not None:
        raise Permanent(f"{_shown(target)} carries a user or password, which is refused; leave it out", code="bad_url")
    return target


def _host(target: SplitResult) -> str:
    """As it goes over the wire; ValueError if it cannot (a UnicodeError is one)."""
    return (target.hostname or "").encode("idna").decode()


def _shown(target: SplitResult) -> str:
    """The URL for messages: its query may be a secret, as a signature is."""
    return f"{target.scheme}://{target.netloc.rpartition('@')[2]}{target.path}"[:NAME_CHARS]


def _places(target: SplitResult, is_allowed: Callable[[Address], bool]) -> list[_Place]:
    host = _host(target)
    try:
        found = socket.getaddrinfo(
            host, target.port or (443 if target.scheme == "https" else 80), type=socket.SOCK_STREAM
        )
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise Transient(f"{_shown(target)}: the name {host} cannot be resolved now; try again") from error
        raise Permanent(f"{_shown(target)}: there is no host {host}; correct it", code="fetch_failed") from error
    for _, _, _, _, place in found:
        if not is_allowed(ip_address(place[0])):
            raise Permanent(
                f"{_shown(target)} leads to {place[0]}, which is no public address; send the file itself",
                code="private_address",
            )
    return [(family, place) for family, _, _, _, place in found]


@contextmanager
def _response(
    target: SplitResult, end: float, is_allowed: Callable[[Address], bool]
) -> Iterator[http.client.HTTPResponse]:
    """The answer's head; the connection is cut at `end`, however slowly the other side goes on."""
    connection = _Connection(target, _places(target, is_allowed), end)
    watch = Timer(_left(end), connection.abort)
    watch.daemon = True
    watch.start()
    try:
        path = quote(target.path or "/", safe="/%:=&~+!$,;@()*'[]")
        query = "?" + quote(target.query, safe="/%:=&?~+!$,;@()*'[]") if target.query else ""
        connection.request("GET", path + query, headers=_HEADERS)
        yield connection.getresponse()
    except (OSError, http.client.HTTPException):
        _left(end)
        raise
    finally:
        watch.cancel()
        connection.close()


@contextmanager
def _translated(target: SplitResult) -> Iterator[None]:
    """Foreign errors as ours."""
    try:
        yield
    except ssl.SSLEOFError as error:
        raise Transient(f"{_shown(target)}: the connection was cut; try again") from error
    except ssl.SSLError as error:
        raise Permanent(
            f"{_shown(target)}: TLS failed ({error.reason or error}); correct the server or the address",
            code="fetch_failed",
        ) from error
    except TimeoutError as error:
        raise Transient(f"{_shown(target)}: not here in the time of STOKER_DOCUMENTS__FETCH_S; try again") from error
    except (OSError, http.client.HTTPException) as error:
        raise Transient(f"{_shown(target)}: {type(error).__name__}: {error}; try again") from error


def _refuse_status(response: http.client.HTTPResponse, target: SplitResult) -> None:
    status = response.status
    if status >= 500 or status in _LATER:
        wish = response.headers.get("Retry-After", "")
        raise Transient(
            f"{_shown(target)} answered {status} {response.reason}; try again",
            retry_after_s=float(wish) if wish.isdecimal() else None,
        )
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if status != 200 or coding != "identity":
        answer = f"{status} {response.reason}" if status != 200 else f"in the encoding {coding}, not asked for"
        raise Permanent(
            f"{_shown(target)} answered {answer}; correct the address or send the file itself", code="fetch_failed"
        )


def _body(response: http.client.HTTPResponse, target: SplitResult, end: float, most_bytes: int) -> bytes:
    body = bytearray()
    stated = response.length or 0
    while stated <= most_bytes and len(body) <= most_bytes:
        part = response.read1(PART_BYTES)
        _left(end)
        if not part:
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return bytes(body)
        body += part
    size = f"{max(stated, len(body)):,} bytes{'' if stated > most_bytes else ' and goes on'}"
    raise Permanent(
        f"{_shown(target)} has {size}, more than the {most_bytes:,} of STOKER_DOCUMENTS__FILE_BYTES; split it",
        code="too_large",
    )


def _name(response: http.client.HTTPResponse, target: SplitResult) -> str:
    stated = response.headers.get_filename() or unquote(target.path)
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", stated)[-1])[-NAME_CHARS:] or "document"
    kind = response.headers.get_content_type() if "Content-Type" in response.headers else _ANYTHING
    if PurePath(name).suffix or kind == _ANYTHING:
        return name
    return name + (mimetypes.guess_extension(kind) or "")


def _left(end: float) -> float:
    """The seconds until `end`; TimeoutError if there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left
