"""Spans in files of this machine, for `stoker trace`: JSON lines as OpenTelemetry's file receivers read them.

All processes write into one file, each line a whole request of OTLP in JSON, and take turns by a lock. What they keep
is bounded: the oldest file goes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from runtime.home import default_home
from runtime.settings import Settings
from runtime.tracing import Value

FOLDER: Final = "traces"
NAMES: Final = ("spans.jsonl", "spans.1.jsonl", "spans.2.jsonl", "spans.3.jsonl")  # the first is written
FILE_BYTES: Final = 64 * 1024 * 1024  # each; chosen: 256 MB are some 400,000 spans
_LOCK: Final = "lock"


def append(folder: Path, line: bytes) -> None:
    """Add a line to the folder's file, or none if it is empty. Raises OSError, as where the disk is full."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open(folder / _LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_room(folder, len(line))
        if line:
            with _open(folder / NAMES[0]) as file:
                before_bytes = os.fstat(file.fileno()).st_size
                if file.write(line + b"\n") <= len(line):
                    os.ftruncate(file.fileno(), before_bytes)  # else the next line would be lost with this one
                    raise OSError(errno.ENOSPC, "the disk is full")


def folder_of(settings: Settings) -> Path:
    """Where spans are kept on this machine."""
    return (settings.home or default_home(os.environ)) / FOLDER


def read_spans(settings: Settings, *, mentioning: str) -> Iterator[dict[str, Any]]:
    """The spans of lines in which this text is, oldest file first; those of other batches may be among them.

    A line that a crash has cut is left out.
    """
    wanted = mentioning.encode()
    for name in reversed(NAMES):
        file = folder_of(settings) / name
        if not file.is_file():
            continue
        with file.open("rb") as lines:
            for line in lines:
                if wanted in line:
                    yield from _spans_in(line)


def _spans_in(line: bytes) -> Iterator[dict[str, Any]]:
    try:
        found = msgspec.json.decode(line)
        for resource in found["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                yield from scope["spans"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return


def _make_room(folder: Path, more_bytes: int) -> None:
    """Move each file to the next name when the first is full; the last is overwritten."""
    first = folder / NAMES[0]
    if not first.exists() or first.stat().st_size + more_bytes <= FILE_BYTES:
        return
    for older, newer in zip(NAMES[:0:-1], NAMES[-2::-1], strict=True):
        if (folder / newer).exists():
            (folder / newer).replace(folder / older)


def _open(path: Path) -> Any:
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))


def plain(value: Mapping[str, Any]) -> Value:
    """What an attribute's value of OTLP's JSON says."""
    ((kind, said),) = value.items()
    if kind == "intValue":
        return int(said)
    if kind == "arrayValue":
        return [str(plain(one)) for one in said["values"]]
    found: Value = said
    return found


def attributes_of(span: Mapping[str, Any]) -> dict[str, Value]:
    """The attributes of a span that was read."""
    listed: Sequence[Mapping[str, Any]] = span.get("attributes", [])
    return {one["key"]: plain(one["value"]) for one in listed}
