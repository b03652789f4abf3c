"""A process that has loaded the `stoker` command and forks one for each request: that is most of a short one's time.

    process, server = start()    # the process ends when `server` is closed, or with its owner
    run(server, ["status"], folder=…, env=…, timeout_s=…)

A command here is a process like any other, with its own environment, pipes and exit status, and what it loads later it
loads itself; only the interpreter's start and the imports of scripts/stoker.py are shared. What tests mark, interrupt
or kill is the real executable: tests.support.processes.Command.
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
from pathlib import Path

REQUEST_BYTES = 1 << 20
READ_BYTES = 1 << 16


def start(program: Path, *, folder: Path, env: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process that forks, which loads what `program` loads, and the socket that it takes requests from."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        program_text = "from tests.support.warm_commands import main; main()"  # `python -m` would show in usage lines
        command = [sys.executable, "-c", program_text, str(theirs.fileno()), str(program)]
        return subprocess.Popen(command, cwd=folder, env=dict(env), pass_fds=[theirs.fileno()]), ours


def run(
    server: socket.socket, arguments: Sequence[str], *, folder: Path, env: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """The command's exit status, stdout and stderr, its stdin being an empty pipe; as subprocess.run it may raise."""
    with ExitStack() as stack:
        reply, their_reply = socket.socketpair()
        stack.enter_context(reply)
        stdin, nothing = os.pipe()
        os.close(nothing)
        stdout, their_stdout = os.pipe()
        stderr, their_stderr = os.pipe()
        pipes = [stack.enter_context(os.fdopen(end, "rb", buffering=0)) for end in (stdout, stderr)]
        with their_reply:
            request = json.dumps({"arguments": list(arguments), "folder": str(folder), "env": dict(env)}).encode()
            ends = [stdin, their_stdout, their_stderr]
            socket.send_fds(server, [request], [*ends, their_reply.fileno()])
            for end in ends:
                os.close(end)
        pid = int(reply.recv(READ_BYTES))
        try:
            printed = _read_all([pipe.fileno() for pipe in pipes], time.monotonic() + timeout_s)
        except TimeoutError as error:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(arguments), timeout_s) from error
        reply.sendall(b"!")
        status = int(reply.recv(READ_BYTES))
    return subprocess.CompletedProcess(list(arguments), status, *(part.decode() for part in printed))


def _read_all(pipes: Sequence[int], end: float) -> list[bytes]:
    parts: dict[int, list[bytes]] = {pipe: [] for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(end - time.monotonic())
            if not ready and time.monotonic() >= end:
                raise TimeoutError
            for key, _ in ready:
                part = os.read(key.fd, READ_BYTES)
                parts[key.fd].append(part)
                if not part:
                    selector.unregister(key.fd)
    return [b"".join(parts[pipe]) for pipe in pipes]


def main() -> None:
    """Fork a command for each request, until nobody can ask any more."""
    server, program = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: its owner ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those below ended
    sys.path[0] = str(program.parent)
    from scripts.stoker import main as command  # noqa: PLC0415  # as the executable finds it, from its own folder

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
    """Return in the command's process only; this one tells its pid and, when it has ended, its status."""
    pid = os.fork()
    if pid == 0:
        reply.close()
        return
    for end in [0, 1, 2, *ends]:
        os.close(end)
    reply.sendall(b"%d" % pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if reply.recv(1):
        reply.sendall(b"%d" % status)
    os._exit(0)
