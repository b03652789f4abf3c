"""The process that reads documents: `python -m documents.child FD` imports the parsers once and forks for each one.

A fork takes milliseconds where a new interpreter takes a second. multiprocessing's forkserver does the same, but not
in a child of Celery's: billiard makes that a daemon, which multiprocessing allows no children.
It must not read a document itself or outlive the process that started it; what it forks is confined before it reads.
"""

from __future__ import annotations

import gc
import math
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from documents.confinement import confine, leave_network
from documents.wire import Fault, Order, Text, out_of_memory, unreadable
from runtime.children import die_with_parent
from runtime.errors import Permanent

PARENT_CHECK_MS: Final = 500
CAUSE_CHARS: Final = 200
PART_BYTES: Final = 1 << 20


def main() -> None:
    """Serve the socket whose descriptor is the first argument until its other end is closed."""
    leave_network()
    from documents.markdown import read  # noqa: PLC0415

    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.sendall(b"\n")
        serve(control, read)


def serve(control: socket.socket, read: Callable[[bytes, Order], Text]) -> None:
    """Fork a reader for every byte that comes with two descriptors, until the other end closes or the parent ends.

    The first descriptor is the reader's socket: order and document come in, the answer goes out. The second is a
    pipe on which the reader's wait status is written when it has ended; closing its other end kills the reader.
    """
    parent = os.getppid()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # with a handler, the signal is written to `woken`
    signal.set_wakeup_fd(woken)
    readers: dict[int, int] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while os.getppid() == parent:
        for end, _ in poll.poll(PARENT_CHECK_MS):
            if end == wake:
                os.read(wake, 4096)
            elif end in readers:
                os.kill(readers[end], signal.SIGKILL)
                os.waitpid(readers.pop(end), 0)
                poll.unregister(end)
                os.close(end)
            else:
                _, ends, _, _ = socket.recv_fds(control, 1, 2)
                if len(ends) != 2:
                    return
                readers[ends[1]] = _fork(ends[0], read, others=[control.fileno(), wake, woken, ends[1], *readers])
                poll.register(ends[1], 0)
        for end in _report_ended(readers):
            poll.unregister(end)
            os.close(end)


def _report_ended(readers: dict[int, int]) -> list[int]:
    """The pipes of readers that have ended, their wait status written; `readers` loses them."""
    statuses = {end: os.waitpid(pid, os.WNOHANG) for end, pid in readers.items()}
    ended = {end: status for end, (pid, status) in statuses.items() if pid}
    for end, status in ended.items():
        del readers[end]
        try:
            os.write(end, status.to_bytes(4, "little"))
        except BrokenPipeError:
            continue
    return list(ended)


def _fork(end: int, read: Callable[[bytes, Order], Text], *, others: Iterable[int]) -> int:
    """The pid of a reader that serves the socket `end` and has nothing else of ours."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        os.close(end)
        return pid
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in others:
            os.close(other)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        if os.getppid() == server:
            with socket.socket(fileno=end) as connection:
                _serve_one(connection, read)
    finally:
        os._exit(0)


def _serve_one(connection: socket.socket, read: Callable[[bytes, Order], Text]) -> None:
    received = bytearray()
    while part := connection.recv(PART_BYTES):
        received += part
    line, _, content = bytes(received).partition(b"\n")
    del received
    order = msgspec.json.decode(line, type=Order)
    confine(memory_bytes=order.memory_bytes, cpu_s=math.ceil(order.convert_s) + 1)
    connection.sendall(_answer(content, order, read))


def _answer(content: bytes, order: Order, read: Callable[[bytes, Order], Text]) -> bytes:
    """The text or the fault as JSON; parsers of hostile bytes raise anything, and the parent learns what."""
    try:
        return msgspec.json.encode(read(content, order))
    except Permanent as error:
        fault = Fault(code=error.code, message=str(error))
    except Exception as error:
        fault = out_of_memory(order) if _is_memory(error) else unreadable(order, cause=_brief(error))
    return msgspec.json.encode(fault)


def _is_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def _brief(error: Exception) -> str:
    """Its class and its words, of which some may be the document's."""
    words = "".join(letter if letter.isprintable() else " " for letter in f"{type(error).__name__}: {error}")
    return words[:CAUSE_CHARS].rstrip(": ")


if __name__ == "__main__":
    main()
