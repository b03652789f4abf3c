"""Documents to Markdown, each in a process of its own that can do nothing else and ends in time.

It must not parse a document here: of an archive it reads the directory, of all others the first bytes.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Final, Self

import msgspec

from documents.kinds import Kind, kind_of
from documents.wire import Fault, Order, Text, out_of_memory, out_of_time, too_much_text, unreadable
from runtime.errors import Fatal, Permanent, Transient, extra_remedy
from runtime.settings import DocumentSettings

START_S: Final = 60.0  # the parsers' import takes 1 s, on a disk that is cold and busy far more
STOP_S: Final = 5.0
STATUS_MS: Final = 5000
NAME_CHARS: Final = 200
PAGES_BYTES: Final = 4 * 1024 * 1024  # the offsets of half a million pages
PART_BYTES: Final = 1 << 20
# A text has no control characters but tab and line end, so JSON at most doubles it.
JSON_GROWTH: Final = 2


@dataclass(frozen=True, slots=True)
class Converted:
    """A document as Markdown.

    `pages` has the character at which each page begins, in order, and is empty for all kinds but PDF: sheets
    and slides are headings. A page without text begins where the one before it ended. `note` says that the
    name is of another kind than the bytes.
    """

    markdown: str
    pages: tuple[int, ...]
    kind: Kind
    note: str | None = None


def check_size(size_bytes: int, name: str, limits: DocumentSettings) -> None:
    """Raise Permanent `too_large` for a document beyond the limit; a stat() is enough to ask."""
    if size_bytes > limits.file_bytes:
        raise Permanent(
            f"{name} has {size_bytes:,} bytes, more than the {limits.file_bytes:,} of STOKER_DOCUMENTS__FILE_BYTES; "
            "split it, or raise the limit",
            code="too_large",
        )


class Converter:
    """Converts in confined child processes: `with Converter(limits) as converter: converter.convert(content, name)`.

    Its process that forks them is started with the block and again whenever it has died. It ends with the
    block, and also when this process is killed. Enter it after a fork, not before.
    """

    def __init__(self, limits: DocumentSettings) -> None:
        self._limits = limits
        self._lock = Lock()
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._server is not None:
                self._server.stop()
                self._server = None

    def convert(self, content: bytes, name: str) -> Converted:
        """The document's text; blocks, and may be called from several threads.

        Raises Permanent with the codes of documents.kinds and `too_large`, `too_much_text`, `archive_bomb`,
        `encrypted_document`, `corrupt_document`, `no_text`, `conversion_timeout` and `conversion_memory`, and
        Transient when the process that forks has died meanwhile.
        """
        name = "".join(letter if letter.isprintable() else "?" for letter in name[-NAME_CHARS:])
        check_size(len(content), name, self._limits)
        kind, note = kind_of(content, name)
        order = Order(
            name=name,
            kind=kind,
            text_bytes=self._limits.text_bytes,
            unpacked_bytes=self._limits.unpacked_bytes,
            memory_bytes=self._limits.convert_memory_bytes,
            convert_s=self._limits.convert_s,
        )
        outcome = self._ask(order, content)
        if isinstance(outcome, Fault):
            raise Permanent(outcome.message, code=outcome.code)
        return Converted(outcome.markdown, outcome.pages, kind, note)

    def _ask(self, order: Order, content: bytes) -> Text | Fault:
        with ExitStack() as stack:
            try:
                connection, life = self._running().fork(stack)
            except Transient:  # it had just died, and no document was with it
                connection, life = self._running().fork(stack)
            end = time.monotonic() + order.convert_s
            try:
                answer = _exchange(connection, order, content, end)
            except TimeoutError:
                return out_of_time(order)
            if len(answer) > _most(order):
                return too_much_text(order)
            try:
                return msgspec.json.decode(answer, type=Text | Fault)
            except ValueError:
                return _cause_of_death(life, order)

    def _running(self) -> _Server:
        with self._lock:
            if self._server is None or not self._server.is_running:
                if self._server is not None:
                    self._server.stop()
                self._server = _Server()
            return self._server


class _Server:
    """A running documents.child."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # From Python 3.12 on a fork beside a thread is warned of; onnxruntime's, which idles, is such a one.
                [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "documents.child", str(theirs.fileno())],
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control.settimeout(START_S)
        try:
            greeting = self._control.recv(1)
        except OSError:
            greeting = b""
        if not greeting:
            self.stop()
            raise Fatal(
                f"the process that reads documents ended with status {self._process.returncode} as it started; "
                f"its stderr says why; the remedy may be: {extra_remedy('documents')}"
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def fork(self, stack: ExitStack) -> tuple[socket.socket, int]:
        """A new reader's socket, and the pipe that tells its end; closed with the stack, which kills the reader."""
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        life, their_life = os.pipe()
        stack.callback(os.close, life)
        try:
            with theirs:
                socket.send_fds(self._control, [b"\n"], [theirs.fileno(), their_life])
        except OSError as error:
            self.stop()
            raise Transient("the process that reads documents has just ended; try again") from error
        finally:
            os.close(their_life)
        return ours, life

    def stop(self) -> None:
        """End it, and with it every reader."""
        self._control.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    """Ours without the settings, which hold passwords; and without threads that no reader would have."""
    kept = {name: value for name, value in os.environ.items() if not (name.startswith("STOKER_") and "__" in name)}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _most(order: Order) -> int:
    return JSON_GROWTH * order.text_bytes + PAGES_BYTES


def _exchange(connection: socket.socket, order: Order, content: bytes, end: float) -> bytes:
    """What the reader says, at most a part more than it may; TimeoutError after `end`, a monotonic time."""
    answer = bytearray()
    try:
        for message in (msgspec.json.encode(order) + b"\n", content):
            connection.settimeout(_left(end))
            connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
        while len(answer) <= _most(order):
            connection.settimeout(_left(end))
            part = connection.recv(PART_BYTES)
            if not part:
                break
            answer += part
    except ConnectionError:
        return b""
    return bytes(answer)


def _cause_of_death(life: int, order: Order) -> Fault:
    """What ended a reader that gave no answer; Transient if the process that forked it has died with it."""
    poll = select.poll()
    poll.register(life, select.POLLIN)
    written = os.read(life, 4) if poll.poll(STATUS_MS) else b""
    if not written:
        raise Transient(f"the process that reads documents ended while it read {order.name}; try again")
    status = int.from_bytes(written, "little")
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return out_of_time(order)
    if number == signal.SIGKILL:  # nobody else sends it
        return out_of_memory(order)
    return unreadable(order, cause=signal.Signals(number).name if number else "its reader gave up")


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
