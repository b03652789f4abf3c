"""Uploaded bytes: files of one folder, on this machine or wherever fsspec reaches.

A blob appears under its name when all of it is there, and never changes. It must not know what is in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from runtime.errors import BlobGone, ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import without_secrets

log = get_logger(__name__)

READ_BYTES: Final = 1024 * 1024
UNFINISHED: Final = ".partial"


class BlobWriter:
    """A blob that is being written; `commit` gives it its name, `discard` leaves nothing of it."""

    def __init__(self, blobs: Blobs, name: str) -> None:
        self._blobs, self._name = blobs, name
        with blobs.translated():
            self._file: Any = blobs.files.open(blobs.place(name + UNFINISHED), "wb")

    def write(self, content: bytes | memoryview) -> None:
        """Append. Raises ServiceUnreachable when the folder cannot take it, being full for example."""
        with self._blobs.translated():
            self._file.write(content)

    def commit(self) -> None:
        """Make it durable, under its name."""
        with self._blobs.translated():
            if self._blobs.is_local:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            self._blobs.files.mv(self._blobs.place(self._name + UNFINISHED), self._blobs.place(self._name))
            self._blobs.sync_folder()

    def discard(self) -> None:
        """Leave nothing; harmless after `commit`."""
        with suppress(OSError):
            self._file.close()
        self._blobs.delete(self._name + UNFINISHED)


class Blobs:
    """The blobs under one URL or folder. Raises ServiceUnreachable from every method when it does not answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files, self._root = fsspec.core.url_to_fs(url)
        self.is_local = isinstance(self.files, LocalFileSystem)
        with self.translated():
            if self.is_local:
                Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                self.files.makedirs(self._root, exist_ok=True)

    def place(self, name: str) -> str:
        """Where the blob of this name is, as the file system calls it."""
        return f"{self._root.rstrip('/')}/{name}"

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a blob, READ_BYTES at a time. Raises BlobGone if there is none."""
        with self.translated(), self._opened(name) as file:
            while piece := file.read(READ_BYTES):
                yield piece

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """The blob as a file of this machine for the block: itself where it is one. Raises BlobGone."""
        if self.is_local:
            with self.translated(), self._opened(name):
                path = Path(self.place(name))
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="stoker-blob-") as folder:
            path = Path(folder) / "blob"
            with self.translated(), self._opened(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, READ_BYTES)
            yield path

    def delete(self, name: str) -> None:
        """Delete a blob; none of this name is no error."""
        with self.translated(), suppress(FileNotFoundError):
            self.files.rm_file(self.place(name))

    def older_than(self, age_s: float) -> list[str]:
        """The names of blobs, and of those never finished, that were last written longer ago than this."""
        with self.translated():
            found = self.files.ls(self._root, detail=True)
        latest = time.time() - age_s
        old = [one for one in found if one["type"] == "file" and _written_at(one) < latest]
        return [one["name"].rpartition("/")[2] for one in old]

    def sync_folder(self) -> None:
        """Make the names in the folder durable, where it is one of this machine."""
        if self.is_local:
            folder = os.open(self._root, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Foreign errors of the block as ours."""
        try:
            yield
        except OSError as error:
            raise ServiceUnreachable(
                f"uploads in {without_secrets(self.url)} cannot be read or written: {error.strerror or error}; "
                "free space, or check STOKER_GATEWAY__FILES"
            ) from error

    def _opened(self, name: str) -> Any:
        try:
            return self.files.open(self.place(name), "rb")
        except FileNotFoundError as error:
            log.error("blob_gone", blob=name, url=without_secrets(self.url))
            raise BlobGone(f"the bytes of {name} are not where uploads are kept") from error


def _written_at(entry: dict[str, Any]) -> float:
    """When a file was last written, in seconds since 1970, as its file system calls it; now if it does not say."""
    for name in ("mtime", "LastModified", "last_modified", "updated"):
        found = entry.get(name)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
    return time.time()
