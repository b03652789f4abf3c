"""Stoker on this machine, started once a process: `stoker up --json --until-eof`, which ends when this process does.

It runs in a session of its own, so that Ctrl-C does not reach it, and reads a pipe whose other end only this process
holds: however this process dies, the pipe closes and Stoker ends. Its batches are kept and go on at the next start.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from stoker_client.errors import NoGateway
from stoker_client.gateway import Place
from stoker_client.progress import Progress
from stoker_client.stopping import Stop

LOOK_S: Final = 0.1
END_S: Final = 60.0  # a graceful end gives back what runs; then it is told to by a signal
SHOWN_LINES: Final = 12
_REMEDY: Final = (
    "name a gateway with base_url and api_key (or STOKER_URL and STOKER_API_KEY), or install Stoker beside this "
    "Python, with its parts for one machine: pip install 'stoker[demo,gateway]'"
)


@dataclass(slots=True)
class _Running:
    """A Stoker that this process started, or that ran already and is followed by the command that this one started."""

    process: subprocess.Popen[bytes]
    place: Place
    owner: int


_lock = threading.Lock()
_running: list[_Running] = []  # at most one


def place(*, stop: Stop, progress: Progress) -> Place:
    """Where the embedded gateway is; started if it does not run. Raises NoGateway with what it said."""
    with _lock:
        if _running and _running[0].owner == os.getpid() and _running[0].process.poll() is None:
            return _running[0].place
        if not _running:
            atexit.register(end)
        _end_running()
        _running.append(_started(stop, progress))
        return _running[0].place


def end() -> None:
    """Let the embedded Stoker end, and wait for it; nothing if none was started here. It may be started again."""
    with _lock:
        _end_running()


def _end_running() -> None:
    """Of a process that was forked from ours it is the parent's affair."""
    for one in _running:
        if one.owner == os.getpid():
            _end(one.process)
    _running.clear()


def _started(stop: Stop, progress: Progress) -> _Running:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as notes:
        process = subprocess.Popen(
            [_program(), "up", "--json", "--until-eof"],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=notes,
            start_new_session=True,
        )
        progress.begin("starting Stoker")
        try:
            while b"\n" not in (told := _content(said)):
                if process.poll() is not None:
                    raise NoGateway(
                        f"Stoker did not start (exit status {process.returncode}):\n{_tail(notes)}\nMend that, or "
                        f"{_REMEDY}"
                    )
                stop.wait(LOOK_S)
                progress.tick()
            return _Running(process, _place(told), os.getpid())
        except BaseException:
            _end(process)
            raise
        finally:
            progress.close()


def _program() -> str:
    beside = Path(sys.executable).with_name("stoker")
    found = str(beside) if beside.is_file() else shutil.which("stoker")
    if found is None:
        raise NoGateway(
            f"there is no gateway: none was named, and there is no program `stoker` to start one; {_REMEDY}"
        )
    return found


def _place(told: bytes) -> Place:
    """Raises NoGateway if what it said is not as agreed, or its key cannot be read."""
    try:
        found = json.loads(told.splitlines()[0])
        url, file = found["url"], Path(found["key_file"])
    except (ValueError, KeyError, TypeError) as error:
        raise NoGateway(f"`stoker up --json` said {told[:200]!r}; install versions of both that go together") from error
    try:
        return Place(url=url, api_key=file.read_text().strip())
    except OSError as error:
        raise NoGateway(
            f"the key of the gateway at {url} cannot be read from {file} ({error.strerror}); make one with "
            "`stoker keys create`, and pass it with base_url"
        ) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def _content(file: IO[bytes]) -> bytes:
    """All of a file that another process writes; where that writes is its own affair."""
    return os.pread(file.fileno(), 65_536, 0)


def _tail(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    text = os.pread(file.fileno(), 65_536, max(0, size - 65_536)).decode(errors="replace")
    return "\n".join(text.splitlines()[-SHOWN_LINES:])
