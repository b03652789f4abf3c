"""A document from a URL that a stranger wrote: from public addresses only, within bounds of bytes and time.

It must not ask for an address twice; how it connects is runtime/public_http.py's.
"""

from __future__ import annotations

import http.client
import mimetypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final
from urllib.parse import SplitResult, unquote, urljoin

from runtime.errors import Permanent, Transient
from runtime.public_http import REDIRECTS, Errand, answer_to, read_target, shown, time_left
from runtime.public_http import Address as Address
from runtime.public_http import is_public as is_public

MOST_REDIRECTS: Final = 5
PART_BYTES: Final = 65_536
NAME_CHARS: Final = 200
_ANYTHING: Final = "application/octet-stream"
_LATER: Final = (408, 425, 429)  # beside all from 500


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came, under which name, and from where after all redirects."""

    content: bytes
    name: str
    url: str


def fetch(url: str, *, most_bytes: int, timeout_s: float, is_allowed: Callable[[Address], bool] = is_public) -> Fetched:
    """The bytes at `url`, over HTTP or HTTPS.

    Every host on the way is resolved once, all its addresses must be allowed, and one of those is connected to.
    Raises Permanent `bad_url`, `private_address`, `fetch_failed` or `too_large`, and Transient for what may pass:
    no connection, `timeout_s` over, 408, 425, 429 and the 500s. Only a resolver that hangs can take longer.
    """
    end = time.monotonic() + timeout_s
    errand = Errand(
        is_allowed,
        instead="send the file itself",
        within="the time of STOKER_DOCUMENTS__FETCH_S",
        later="; try again",
    )
    for _ in range(MOST_REDIRECTS + 1):
        target = read_target(url)
        with answer_to("GET", target, errand, end=end) as response:
            if response.status in REDIRECTS:
                url = urljoin(url, response.headers.get("Location", ""))
                continue
            _refuse_status(response, target)
            return Fetched(_body(response, target, end, most_bytes), _name(response, target), url)
    raise Permanent(
        f"{shown(target)}: more than {MOST_REDIRECTS} redirects; give the address they lead to", code="fetch_failed"
    )


def _refuse_status(response: http.client.HTTPResponse, target: SplitResult) -> None:
    status = response.status
    if status >= 500 or status in _LATER:
        wish = response.headers.get("Retry-After", "")
        raise Transient(
            f"{shown(target)} answered {status} {response.reason}; try again",
            retry_after_s=float(wish) if wish.isdecimal() else None,
        )
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if status != 200 or coding != "identity":
        answer = f"{status} {response.reason}" if status != 200 else f"in the encoding {coding}, not asked for"
        raise Permanent(
            f"{shown(target)} answered {answer}; correct the address or send the file itself", code="fetch_failed"
        )


def _body(response: http.client.HTTPResponse, target: SplitResult, end: float, most_bytes: int) -> bytes:
    body = bytearray()
    stated = response.length or 0
    while stated <= most_bytes and len(body) <= most_bytes:
        part = response.read1(PART_BYTES)
        time_left(end)
        if not part:
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return bytes(body)
        body += part
    size = f"{max(stated, len(body)):,} bytes{'' if stated > most_bytes else ' and goes on'}"
    raise Permanent(
        f"{shown(target)} has {size}, more than the {most_bytes:,} of STOKER_DOCUMENTS__FILE_BYTES; split it",
        code="too_large",
    )


def _name(response: http.client.HTTPResponse, target: SplitResult) -> str:
    stated = response.headers.get_filename() or unquote(target.path)
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", stated)[-1])[-NAME_CHARS:] or "document"
    kind = response.headers.get_content_type() if "Content-Type" in response.headers else _ANYTHING
    if PurePath(name).suffix or kind == _ANYTHING:
        return name
    return name + (mimetypes.guess_extension(kind) or "")
