"""Child processes that do not outlive their parent: start them, end them, find those that a crash left.

On Linux the kernel ends a child with the thread that started it (PR_SET_PDEATHSIG), also after kill -9.
Elsewhere, and for what the kernel missed, a file of remembered children lets the next start clear them.
It must not know what the children are, restart them, or end a process that it cannot prove to be one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

POLL_INTERVAL_S = 0.01
PR_SET_PDEATHSIG = 1
KILL_GRACE_S = 5.0

# Runs in the child before the command takes its place: an interpreter of its own, because code between fork
# and exec of a process with threads may deadlock (preexec_fn warns of it from Python 3.12 on). The order
# matters: another account may not be able to read the standard library, its choice clears the death signal,
# and a parent that died before that was set must be noticed by hand.
_TRAMPOLINE = """
import os, sys
parent, death_signal, account, guard, guard_s, *command = sys.argv[1:]
watched = []
if sys.platform == "linux":
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        watched = [os.pidfd_open(int(parent)), os.pidfd_open(os.getpid())] if guard_s else []
    except (AttributeError, OSError):
        pass  # before Linux 5.3, or where a container forbids it, there is no guard
if account:
    import pwd
    entry = pwd.getpwnam(account)
    os.setgroups([entry.pw_gid]); os.setgid(entry.pw_gid); os.setuid(entry.pw_uid)
if sys.platform == "linux":
    if libc.prctl(1, int(death_signal), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
if os.getppid() != int(parent):
    sys.exit("the parent is gone")
if watched and os.fork() == 0:
    for end in watched:
        os.set_inheritable(end, True)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", guard, *map(str, watched), guard_s])
os.execv(command[0], command)
"""

# Waits in the child's session for the end of the parent and then, not for ever, of the child, and ends what is left
# of the session: first those that clean up, such as multiprocessing's resource tracker, which unlinks shared memory
# when the others are gone. A parent that ends the session itself, with SIGTERM after the child's end, needs no guard.
_GUARD = """
import os, select, signal, sys, time
parent, child, guard_s = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: select.select([int(child)], [], [], 0)[0] and os._exit(0))
os.closerange(0, 3)
select.select([int(parent)], [], [])
select.select([int(child)], [], [], float(guard_s))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
time.sleep(1)
os.killpg(0, signal.SIGKILL)
"""


@dataclass(frozen=True, slots=True)
class RememberedChild:
    """A child as a later process recognises it: `birth` is its own, also when its pid is used again."""

    name: str
    pid: int
    birth: str
    stop_signal: int


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path | None,
    session: bool,
    death_signal: int = signal.SIGTERM,
    guard_s: float | None = None,
    account: str | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command`, which dies with the calling *thread*; raise FileNotFoundError if it does not exist.

    The kernel ties the child to the thread, not to the process: call this from a thread that lives as long
    as the child should (the main thread, as a rule), not from a pool. `death_signal` is what the child then
    gets; on systems other than Linux it gets nothing. stdout and stderr are appended to `log`; without one
    the child shares ours. `stdout` and `stderr` may be subprocess.PIPE: the log has not that one then. It begins
    in `folder`, or in ours. `session` shields the child from the terminal's Ctrl-C and from signals to our group.
    With `guard_s` it has a session, and on Linux what is left of it is killed when our process and the child have
    ended, or so long after our end: for a child that may ignore its signal, or has children of its own. With
    `account` it runs as that user, which needs root.
    """
    program = shutil.which(command[0], path=env.get("PATH", os.defpath))
    if program is None:
        raise FileNotFoundError(f"no such program: {command[0]}")
    trampoline = [sys.executable, "-I", "-S", "-c", _TRAMPOLINE]
    orders = [os.getpid(), int(death_signal), account or "", _GUARD, guard_s or "", Path(program).absolute()]
    output = None if log is None else log.open("ab")
    try:
        return subprocess.Popen(
            [*trampoline, *map(str, orders), *command[1:]],
            env=dict(env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output if stdout is None else stdout,
            stderr=output if stderr is None else stderr,
            start_new_session=session or guard_s is not None,
        )
    finally:
        if output is not None:
            output.close()


def die_with_parent() -> None:
    """Let the kernel end this process (SIGKILL) when the thread that forked it ends; Linux only.

    For a forked child that holds nothing another process could not take over.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(child: subprocess.Popen[bytes], *, grace_s: float, stop_signal: int = signal.SIGTERM) -> int:
    """End the child with `stop_signal`, after `grace_s` with SIGKILL; return its exit status.

    A child that has already ended is left alone.
    """
    if child.poll() is None:
        child.send_signal(stop_signal)
    try:
        return child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def remember(pid_file: Path, *, name: str, child: subprocess.Popen[bytes], stop_signal: int = signal.SIGTERM) -> None:
    """Add a running child to the file that the next start reads if we die. Hold a lock: one writer only."""
    birth = birth_of(child.pid)
    if birth is not None:
        _write(pid_file, [*_read(pid_file), RememberedChild(name, child.pid, birth, int(stop_signal))])


def end_remembered(pid_file: Path, *, grace_s: float) -> list[str]:
    """End the children in the file that still run, forget all, and name the ended: `postgres (pid 4711)`.

    A pid that now belongs to another process is never touched. All are asked at once; what is still there
    after `grace_s` is killed. Running it twice is harmless.
    """
    left = [child for child in _read(pid_file) if birth_of(child.pid) == child.birth]
    for child in left:
        _signal(child, child.stop_signal)
    if not _wait_all(left, timeout_s=grace_s):
        for child in left:
            _signal(child, signal.SIGKILL)
        _wait_all(left, timeout_s=KILL_GRACE_S)
    pid_file.unlink(missing_ok=True)
    return [f"{child.name} (pid {child.pid})" for child in left]


def birth_of(pid: int) -> str | None:
    """A text that only this run of this pid has; None when no such process runs (a zombie does not).

    On Linux the boot id and the start in clock ticks since boot; elsewhere what ps knows, to the second.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()  # the program's name may hold anything
        return None if fields[0] in "ZX" else f"{boot_id}:{fields[19]}"
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    line = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return None if not line or line.startswith("Z") else line.partition(" ")[2].strip()


def _signal(child: RememberedChild, number: int) -> None:
    if birth_of(child.pid) == child.birth:
        try:
            os.kill(child.pid, number)
        except ProcessLookupError:
            return


def _wait_all(children: Sequence[RememberedChild], *, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while any(birth_of(child.pid) == child.birth for child in children):
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def _read(pid_file: Path) -> list[RememberedChild]:
    try:
        return [RememberedChild(**entry) for entry in json.loads(pid_file.read_text())]
    except FileNotFoundError:
        return []


def _write(pid_file: Path, children: Sequence[RememberedChild]) -> None:
    """Replace the file in one step, so that a crash leaves the old or the new list."""
    new = pid_file.with_suffix(".new")
    new.write_text(json.dumps([asdict(child) for child in children]))
    new.replace(pid_file)
