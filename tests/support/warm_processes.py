"""Processes that are forked from one that has loaded their program: most of a short command's time is that loading.

    with Forking("scripts.stoker:main", program=STOKER, folder=…, env=…) as forking:
        forking.run(["status"], env=…, timeout_s=…)

What is forked is a process like any other, with its own arguments, environment, pipes and exit status, and what it
loads later it loads itself; only the interpreter's start and the first imports are shared. The commands that tests
mark, interrupt or kill are the real executable: tests.support.processes.Command.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

REQUEST_BYTES = 1 << 20
READ_BYTES = 1 << 16
_MAIN = "from tests.support.warm_processes import main; main()"  # `python -m` would show in usage lines


class Forked:
    """A process that was forked; as subprocess.Popen, as far as it goes."""

    def __init__(self, reply: socket.socket) -> None:
        self._reply = reply
        self.pid = int(reply.recv(READ_BYTES))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        self._read(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        self._read(0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _read(self, flags: int) -> None:
        if self.returncode is not None:
            return
        try:
            self.returncode = int(self._reply.recv(READ_BYTES, flags))
        except BlockingIOError:
            return
        self._reply.close()


class Forking:
    """A process that has loaded `entry`, a "module:function", and ends when it is closed, or with its owner.

    `program` is what the forked ones see as sys.argv[0]; modules are looked for beside it first.
    """

    def __init__(self, entry: str, *, program: Path, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        self._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-c", _MAIN, str(theirs.fileno()), str(program), entry]
            self._process = subprocess.Popen(command, cwd=folder, env=dict(env), pass_fds=[theirs.fileno()])

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._server.close()
        self._process.wait()

    def start(self, arguments: Sequence[str], *, env: Mapping[str, str], ends: Sequence[int] = (0, 1, 2)) -> Forked:
        """Fork the program with these arguments, and with `ends` as its stdin, stdout and stderr."""
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            asked = {"arguments": list(arguments), "folder": str(self._folder), "env": dict(env)}
            socket.send_fds(self._server, [json.dumps(asked).encode()], [*ends, theirs.fileno()])
        return Forked(reply)

    def run(
        self, arguments: Sequence[str], *, env: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run does, with an empty pipe as stdin: exit status, stdout and stderr; or TimeoutExpired."""
        stdin, nothing = os.pipe()
        os.close(nothing)
        stdout, their_stdout = os.pipe()
        stderr, their_stderr = os.pipe()
        with ExitStack() as stack:
            for end in (stdout, stderr):
                stack.callback(os.close, end)
            ends = [stdin, their_stdout, their_stderr]
            try:
                forked = self.start(arguments, env=env, ends=ends)
            finally:
                for end in ends:
                    os.close(end)
            try:
                printed = _read_all([stdout, stderr], time.monotonic() + timeout_s)
            except TimeoutError as error:
                forked.kill()
                raise subprocess.TimeoutExpired(list(arguments), timeout_s) from error
            return subprocess.CompletedProcess(list(arguments), forked.wait(), *(part.decode() for part in printed))


def _read_all(pipes: Sequence[int], end: float) -> list[bytes]:
    parts: dict[int, list[bytes]] = {pipe: [] for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready and time.monotonic() >= end:
                raise TimeoutError
            for key, _ in ready:
                part = os.read(key.fd, READ_BYTES)
                parts[key.fd].append(part)
                if not part:
                    selector.unregister(key.fd)
    return [b"".join(parts[pipe]) for pipe in pipes]


def main() -> None:
    """Fork the program for each request, until nobody can ask any more."""
    server, program, entry = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: its owner ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those below ended
    sys.path[0] = str(program.parent)
    module, _, function = entry.partition(":")
    command = getattr(import_module(module), function)
    gc.freeze()  # collections in a command need not copy what it shares
    while True:
        request, ends, _, _ = socket.recv_fds(server, REQUEST_BYTES, maxfds=4)
        if not request:
            return
        if os.fork() == 0:
            server.close()
            break
        for end in ends:
            os.close(end)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _attend(socket.socket(fileno=ends.pop()), ends)
    asked = json.loads(request)
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["folder"])
    sys.argv = [str(program), *asked["arguments"]]
    command()


def _attend(reply: socket.socket, ends: Sequence[int]) -> None:
    """Return in the program's process only; this one tells its pid and, when it has ended, its status."""
    pid = os.fork()
    if pid == 0:
        reply.close()
        return
    for end in [0, 1, 2, *ends]:
        os.close(end)
    try:
        reply.sendall(b"%d" % pid)
        reply.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    except OSError:
        os._exit(1)  # nobody wants to know any more
    os._exit(0)
