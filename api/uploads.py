"""An upload as it streams in: parts of a multipart body, the file's straight into its blob, in flat memory.

Nothing of an upload that is refused or cut off stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from api.errors import ApiError
from runtime.settings import GatewaySettings
from store.blobs import Blobs, BlobWriter

FEED_BYTES: Final = 1024 * 1024  # parsed and written in one go, in a thread
SILENT_S: Final = 60.0  # an upload that sends nothing for so long is given up
LEAST_BYTES_S: Final = 16 * 1024  # on average, after the first minute: places are not for those who trickle
FIELD_BYTES: Final = 4096
MOST_FIELDS: Final = 16
NAME_CHARACTERS: Final = 255
_UNFIT: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(slots=True)
class Upload:
    """What came: the form's fields, and of the file its name, size and sha256. Its blob is written, not yet named."""

    writer: BlobWriter
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size_bytes: int = 0
    digest: str = ""


class UploadSlots:
    """How many uploads run at once, of all tenants and of each. Lives in the event loop's thread."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._running: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """A place for one upload. Raises ApiError 429 when there is none."""
        if self._running.total() >= self._settings.uploads or self._running[tenant] >= self._settings.tenant_uploads:
            raise ApiError(
                429,
                f"too many uploads at once (at most {self._settings.tenant_uploads} of a tenant's); try again soon",
                kind="rate_limit_error",
                code="too_many_uploads",
                headers={"Retry-After": "2"},
            )
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]


async def receive(request: Request, blobs: Blobs, *, name: str, most_bytes: int) -> Upload:
    """The whole upload. The caller commits its writer, or discards it. Raises ApiError, having discarded it."""
    boundary = _boundary(request)
    if int(request.headers.get("content-length") or 0) > most_bytes + FEED_BYTES:
        raise _too_large(most_bytes)
    upload = Upload(await run_in_threadpool(BlobWriter, blobs, name))
    form = _Form(upload, boundary, most_bytes=most_bytes)
    try:
        async for piece in _pieces(request):
            await run_in_threadpool(form.feed, piece)
        form.end()
    except BaseException as error:
        await run_in_threadpool(upload.writer.discard)
        if isinstance(error, MultipartParseError):
            raise ApiError(400, f"the multipart body is malformed: {error}; send it as the client does") from error
        if isinstance(error, ClientDisconnect):
            raise ApiError(400, "the upload was cut off; send it again", code="incomplete_upload") from error
        raise
    return upload


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body, FEED_BYTES at a time."""
    stream = aiter(request.stream())
    held, size, taken, began = [], 0, 0, time.monotonic()
    while True:
        try:
            async with asyncio.timeout(SILENT_S):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise ApiError(408, f"nothing came for {SILENT_S:.0f} s; send it again") from error
        if chunk is None:
            break
        taken += len(chunk)
        if time.monotonic() - began > SILENT_S and taken < LEAST_BYTES_S * (time.monotonic() - began):
            raise ApiError(408, f"slower than {LEAST_BYTES_S // 1024} KB/s; send it over a better line")
        held.append(chunk)
        size += len(chunk)
        if size >= FEED_BYTES:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


class _Form:
    """The parser's callbacks: which part we are in, and where its bytes go."""

    def __init__(self, upload: Upload, boundary: bytes, *, most_bytes: int) -> None:
        self._upload = upload
        self._most_bytes = most_bytes
        self._sha256 = hashlib.sha256()
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._field: str | None = None
        self._value = b""
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._name_part,
                "on_part_data": self._add,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> None:
        """Parse the next piece of the body."""
        if piece:
            self._parser.write(piece)

    def end(self) -> None:
        """The body is over. Raises ApiError when it ended too early, or had no file."""
        if not self._is_complete:
            raise ApiError(400, "the upload was cut off; send it again", code="incomplete_upload")
        if self._upload.filename is None:
            raise ApiError(400, "the form has no file; send it in a field called `file`, with a name", param="file")
        self._upload.digest = self._sha256.hexdigest()

    def _begin_part(self) -> None:
        self._field, self._value, self._disposition = None, b"", b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _name_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self._upload.filename is not None:
                raise ApiError(400, "the form has two files; send one", param="file")
            self._upload.filename = _plain_name(options.get(b"filename", b"").decode(errors="replace"))
        elif name in self._upload.fields or len(self._upload.fields) >= MOST_FIELDS:
            raise ApiError(
                400, "the form repeats a field, or has too many; send each once", param=name[:NAME_CHARACTERS]
            )
        self._field = name

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            piece = memoryview(data)[start:end]
            self._upload.size_bytes += len(piece)
            if self._upload.size_bytes > self._most_bytes:
                raise _too_large(self._most_bytes)
            self._sha256.update(piece)
            self._upload.writer.write(piece)
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES:
            raise ApiError(400, f"has more than {FIELD_BYTES} bytes; only `file` may", param=self._field)

    def _end_part(self) -> None:
        if self._field is not None and self._field != "file":
            try:
                self._upload.fields[self._field] = self._value.decode()
            except UnicodeDecodeError as error:
                raise ApiError(400, "is no valid UTF-8", param=self._field) from error

    def _end(self) -> None:
        self._is_complete = True


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise ApiError(
            415, "send a multipart/form-data body with the fields `file` and `purpose`, as `curl -F` and the client do"
        )
    return boundary


def _plain_name(name: str) -> str:
    """The last part of a path, without control characters."""
    return _UNFIT.sub("", PurePosixPath(name.replace("\\", "/")).name)[-NAME_CHARACTERS:] or "upload"


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"the file has more than {most_bytes:,} bytes; split it", param="file", code="file_too_large")
