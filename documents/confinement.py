"""What a process gives up before it reads hostile bytes: the network, other programs, files, memory and time.

It must not be called in a process that is to do anything else afterwards: there is no way back.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Final

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
PR_SET_NO_NEW_PRIVS: Final = 38

# Python's modules and their tables are loaded when they are first needed.
_LIBRARIES: Final = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
# The groups of audit events that reach out of the process; `os` is one too.
_REFUSED: Final = frozenset(
    {
        *("ctypes", "fcntl", "ftplib", "glob", "http", "imaplib", "nntplib", "poplib", "pty", "shutil", "smtplib"),
        *("socket", "sqlite3", "subprocess", "syslog", "telnetlib", "tempfile", "urllib", "webbrowser"),
    }
)
_HARMLESS: Final = frozenset({"os.listdir", "os.scandir"})  # how Python finds modules
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> bool:
    """Move this process and its later children into a network without interfaces; False where that is not allowed.

    A user namespace comes with it where it may: nobody needs to be root then, and root is none any more. It must
    have one thread only, so call it before numpy and its like are imported.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWUSER | CLONE_NEWNET, CLONE_NEWNET))


def confine(*, memory_bytes: int, cpu_s: int) -> None:
    """Limit this process for the rest of its life, and refuse what an audit hook can see.

    After it Python code here opens no socket, starts no process, and opens no file but to read Python's
    libraries; each raises PermissionError. The kernel ends it with SIGXCPU after `cpu_s`.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # root is exempt
    }
    for number, most in limits.items():
        _lower(number, most, most)
    _lower(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)  # at the hard limit the kernel sends SIGKILL, as for memory
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    sys.addaudithook(_refuse)


def _lower(number: int, soft: int, hard: int) -> None:
    most = resource.getrlimit(number)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(number, (soft, hard))


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or (_is_library(path) and not (isinstance(flags, int) and flags & _WRITING)):
            return
        raise PermissionError(f"a document's reader may not open {path!r}")
    group = event.partition(".")[0]
    if group in _REFUSED or (group == "os" and event not in _HARMLESS):
        raise PermissionError(f"a document's reader may not do this: {event}")


def _is_library(path: object) -> bool:
    return isinstance(path, str | bytes | Path) and os.path.realpath(os.fsdecode(path)).startswith(_LIBRARIES)
