"""One HTTP request to a URL that a stranger wrote: to allowed addresses only, within a time, on its own connection.

A host is resolved once, all its addresses must be allowed, and one of those is connected to: resolving twice is how
names are rebound. It must not use a proxy, cookies or credentials, follow a redirect, or keep a connection.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from threading import Timer
from typing import Any, Final
from urllib.parse import SplitResult, quote, urlsplit

from runtime.errors import Permanent, Transient

Address = IPv4Address | IPv6Address
SHOWN_CHARS: Final = 200
DRAINED_BYTES: Final = 4096
REDIRECTS: Final = (301, 302, 303, 307, 308)
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
class Errand:
    """Whose request it is: the addresses it may go to, and how its errors tell people what to do.

    `instead`: what to do where an address is refused. `within`: the time, as it is set. `later`: appended to what
    may pass.
    """

    is_allowed: Callable[[Address], bool]
    instead: str
    within: str
    later: str


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public Internet; an IPv4 address within one of IPv6 counts as itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(address.packed[-4:]))
    return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER)


def read_target(url: str) -> SplitResult:
    """The parts of an http or https URL. Raises Permanent `bad_url` for anything else, and for credentials in it."""
    try:
        target = urlsplit(url)
        port = target.port
        host = _host(target)
    except ValueError as error:
        raise Permanent(f"{url[:SHOWN_CHARS]!r} is no URL: {error}; correct it", code="bad_url") from error
    if target.scheme not in ("http", "https") or not host or port == 0 or _UNFIT.search(target.netloc):
        raise Permanent(f"{url[:SHOWN_CHARS]!r} is no http or https URL with a host; correct it", code="bad_url")
    if target.username is not None or target.password is not None:
        raise Permanent(f"{shown(target)} carries a user or password, which is refused; leave it out", code="bad_url")
    return target


def shown(target: SplitResult) -> str:
    """The URL for messages: its query may be a secret, as a signature is."""
    return f"{target.scheme}://{target.netloc.rpartition('@')[2]}{target.path}"[:SHOWN_CHARS]


def stated_address(target: SplitResult) -> Address | None:
    """The address that the URL itself states, in any spelling that a resolver takes; None if it states a name."""
    try:
        found = socket.getaddrinfo(_host(target), None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return None
    return ip_address(found[0][4][0])


@contextmanager
def answer_to(
    method: str,
    target: SplitResult,
    errand: Errand,
    *,
    end: float,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Iterator[http.client.HTTPResponse]:
    """The answer's head, its body yet to be read; the connection is cut at `end`, however slowly the answer comes.

    Also what the block raises of a broken connection is translated. Raises Permanent `private_address` or
    `fetch_failed`, and Transient for what may pass: no connection, `end` (of time.monotonic) over. Only a resolver that
    hangs can take longer.
    """
    with _translated(target, errand):
        connection = _Connection(target, _places(target, errand), end)
        watch = Timer(time_left(end), connection.abort)
        watch.daemon = True
        watch.start()
        try:
            path = quote(target.path or "/", safe="/%:=&~+!$,;@()*'[]")
            query = "?" + quote(target.query, safe="/%:=&?~+!$,;@()*'[]") if target.query else ""
            connection.request(method, path + query, body=body, headers={**_HEADERS, **(headers or {})})
            yield connection.getresponse()
        except (OSError, http.client.HTTPException):
            time_left(end)
            raise
        finally:
            watch.cancel()
            connection.close()


def drain(answer: http.client.HTTPResponse) -> None:
    """Read a little of the body and forget it, so that the other side sees its answer taken; nothing if it breaks."""
    with suppress(OSError, http.client.HTTPException):
        answer.read1(DRAINED_BYTES)


def time_left(end: float) -> float:
    """The seconds until `end`; TimeoutError if there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left


_Place = tuple[socket.AddressFamily, Any]


class _Connection(http.client.HTTPConnection):
    """To one of the addresses that were checked, whatever the host's name means by now."""

    def __init__(self, target: SplitResult, places: list[_Place], end: float) -> None:
        super().__init__(_host(target), _port(target))
        self.default_port = 443 if target.scheme == "https" else 80
        self._context = ssl.create_default_context() if target.scheme == "https" else None
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
                opened.settimeout(time_left(self._end))
                opened.connect(place)
            except OSError as error:
                opened.close()
                failure = error
            else:
                return opened
        raise failure or OSError("no address")


def _host(target: SplitResult) -> str:
    """As it goes over the wire; ValueError if it cannot (a UnicodeError is one)."""
    return (target.hostname or "").encode("idna").decode()


def _port(target: SplitResult) -> int:
    return target.port or (443 if target.scheme == "https" else 80)


def _places(target: SplitResult, errand: Errand) -> list[_Place]:
    host = _host(target)
    try:
        found = socket.getaddrinfo(host, _port(target), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise Transient(f"{shown(target)}: the name {host} cannot be resolved now{errand.later}") from error
        raise Permanent(f"{shown(target)}: there is no host {host}; correct it", code="fetch_failed") from error
    for _, _, _, _, place in found:
        if not errand.is_allowed(ip_address(place[0])):
            raise Permanent(
                f"{shown(target)} leads to {place[0]}, which is no public address; {errand.instead}",
                code="private_address",
            )
    return [(family, place) for family, _, _, _, place in found]


@contextmanager
def _translated(target: SplitResult, errand: Errand) -> Iterator[None]:
    """Foreign errors as ours."""
    try:
        yield
    except ssl.SSLEOFError as error:
        raise Transient(f"{shown(target)}: the connection was cut{errand.later}") from error
    except ssl.SSLError as error:
        raise Permanent(
            f"{shown(target)}: TLS failed ({error.reason or error}); correct the server or the address",
            code="fetch_failed",
        ) from error
    except TimeoutError as error:
        raise Transient(f"{shown(target)}: not done in {errand.within}{errand.later}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Transient(f"{shown(target)}: {type(error).__name__}: {error}{errand.later}") from error
