"""Which core a process may run on, and the CPU seconds that it took: /proc only, so Linux only.

It must leave nothing pinned: `kept_on` restores what it changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """`own_s`: its own CPU seconds; `reaped_s`: those of children that have ended."""

    pid: int
    parent: int
    own_s: float
    reaped_s: float
    command: str


def processes() -> dict[int, Process]:
    """Every process that runs now, by its pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                ticks = [int(field) / TICKS_PER_S for field in fields[11:15]]
                pid = int(entry.name)
                found[pid] = Process(pid, int(fields[1]), ticks[0] + ticks[1], ticks[2] + ticks[3], command)
    return found


def tree(root: int, everyone: Mapping[int, Process]) -> list[Process]:
    """A process and all that descend from it; nothing if it has ended."""
    found = [everyone[root]] if root in everyone else []
    for process in found:  # grows while it is read
        found += [other for other in everyone.values() if other.parent == process.pid]
    return found


def tree_cpu_s(root: int, everyone: Mapping[int, Process]) -> float:
    """CPU seconds of a process and all of its descendants, those that have ended and been reaped included."""
    return sum(process.own_s + process.reaped_s for process in tree(root, everyone))


def pin(root: int, cores: set[int]) -> bool:
    """Let a process, its threads and its descendants run on these cores only; False where we may not say."""
    try:
        for process in tree(root, processes()):
            with suppress(FileNotFoundError):  # it has ended meanwhile
                for task in Path(f"/proc/{process.pid}/task").iterdir():
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(int(task.name), cores)
    except PermissionError:
        return False
    return True


def two_cores() -> list[int]:
    """The cores that we may use, in their order; SystemExit if an endpoint cannot have one of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("the endpoint wants a core of its own: this needs two cores or more")
    return cores


@contextmanager
def kept_on(cores: set[int], servers: Mapping[str, int]) -> Iterator[list[str]]:
    """This thread, what it starts, and these servers on those cores for the block; the names of what was pinned."""
    ours = os.sched_getaffinity(0)
    before = {pid: os.sched_getaffinity(pid) for pid in servers.values()}
    pinned = []
    try:
        os.sched_setaffinity(0, cores)
        pinned = ["this", *(name for name, pid in servers.items() if pin(pid, cores))]
        if len(pinned) <= len(servers):
            raise SystemExit(f"only {', '.join(pinned)} may be kept on {sorted(cores)}: run as whoever runs the others")
        yield pinned
    finally:
        os.sched_setaffinity(0, ours)
        for name, pid in servers.items():
            if name in pinned:
                pin(pid, before[pid])
