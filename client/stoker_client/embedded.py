"""Stoker on this machine, started once a process: `stoker up --json --until-eof`, which ends when this process does.

It runs in a session of its own, so that Ctrl-C does not reach it, and reads a pipe whose other end only this process
holds: however this process dies, the pipe closes and Stoker ends. Its batches are kept and go on at the next start.
A child that is forked from this process lets go of the pipe, and starts its own Stoker if it needs one.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from stoker_client.errors import NoGateway
from stoker_client.gateway import Place
from stoker_client.progress import Progress
from stoker_client.stopping import Stop

LOOK_S: Final = 0.1
END_S: Final = 60.0  # a graceful end gives back what runs; then it is told to by a signal
TERMINATE_S: Final = 20.0  # that the signal is obeyed in; then it is killed
SHOWN_LINES: Final = 12
_REMEDY: Final = (
    "name a gateway with base_url and api_key (or STOKER_URL and STOKER_API_KEY), or install Stoker beside this "
    "Python, with its parts for one machine: pip install -e '.[demo,gateway]' in Stoker's folder"
)


@dataclass(slots=True)
class _Running:
    """A Stoker that this process started, or that ran already and is followed by the command that this one started."""

    process: subprocess.Popen[bytes]
    place: Place


@dataclass(slots=True)
class _Ours:
    """What this process started, one at most. `forking` is held by who forks, and while a pipe is made and noted."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    forking: threading.Lock = field(default_factory=threading.Lock)
    running: _Running | None = None
    process: subprocess.Popen[bytes] | None = None  # also while it starts
    is_noted: bool = False  # by what ends it, at the end of this process and in a forked one


_ours: Final = _Ours()


def place(*, stop: Stop, progress: Progress) -> Place:
    """Where the embedded gateway is; started if it does not run. Raises NoGateway with what it said."""
    with _ours.lock:
        if _ours.running is not None and _ours.running.process.poll() is None:
            return _ours.running.place
        if not _ours.is_noted:
            _ours.is_noted = True
            atexit.register(end)
            os.register_at_fork(
                before=_ours.forking.acquire, after_in_parent=_ours.forking.release, after_in_child=_let_go
            )
        _end(END_S, TERMINATE_S)
        _ours.running = _started(stop, progress)
        return _ours.running.place


def end(*, wait_s: float = END_S, terminate_s: float = TERMINATE_S) -> None:
    """Let the embedded Stoker end, and wait for it; nothing if none was started here. It may be started again.

    After `wait_s` it is told to by a signal, and killed if it has not obeyed after `terminate_s`.
    """
    with _ours.lock:
        _end(wait_s, terminate_s)


def _let_go() -> None:
    """In a forked child: Stoker is its parent's, and so is the thread that may hold the lock."""
    process, _ours.process, _ours.running = _ours.process, None, None
    _ours.lock = threading.Lock()
    _ours.forking.release()
    if process is not None and process.stdin is not None:
        process.stdin.close()
        process.returncode = 0  # there is no child to wait for


def _started(stop: Stop, progress: Progress) -> _Running:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as notes:
        command = [_program(), "up", "--json", "--until-eof"]
        with _ours.forking:
            process = _ours.process = subprocess.Popen(
                command,
                bufsize=0,  # a buffer has a lock, which a forked child could wait for
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
            return _Running(process, _place(told))
        except BaseException:
            _end(END_S, TERMINATE_S)
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


def _end(wait_s: float, terminate_s: float) -> None:
    process, _ours.process, _ours.running = _ours.process, None, None
    if process is None:
        return
    if process.stdin is not None:
        process.stdin.close()
    for seconds, harder in ((wait_s, process.terminate), (terminate_s, process.kill)):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            harder()
    process.wait()


def _content(file: IO[bytes]) -> bytes:
    """All of a file that another process writes; where that writes is its own affair."""
    return os.pread(file.fileno(), 65_536, 0)


def _tail(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    text = os.pread(file.fileno(), 65_536, max(0, size - 65_536)).decode(errors="replace")
    return "\n".join(text.splitlines()[-SHOWN_LINES:])
