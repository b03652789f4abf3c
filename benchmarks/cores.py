"""Which core a process may use, and the CPU seconds that trees of processes have used; Linux only, read from /proc.

It must change no affinity that it does not give back.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
LISTENING: Final = "0A"
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc: `cpu_s` is its own and that of the children that it has waited for."""

    pid: int
    name: str
    parent: int
    cpu_s: float


def trees_of(roots: Collection[int]) -> list[Process]:
    """The processes that live now of these trees, each once."""
    found = {process.pid: process for process in _processes()}
    wanted = set(roots) & found.keys()
    grown = True
    while grown:
        more = {pid for pid, process in found.items() if process.parent in wanted} - wanted
        wanted |= more
        grown = bool(more)
    return [found[pid] for pid in sorted(wanted)]


def cpu_seconds(roots: Collection[int]) -> float:
    """What the trees have used so far, their ended children included: a difference of two is what a leg cost."""
    return sum(process.cpu_s for process in trees_of(roots))


def listening_on(port: int) -> int | None:
    """The process that listens on this TCP port here, the eldest of those that share it; None if we may not see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    holders = [process.pid for process in _processes() if inodes & _sockets_of(process.pid)]
    return min(holders, default=None)


@contextmanager
def pinned(roots: Collection[int], *, core: int) -> Iterator[list[str]]:
    """All threads of these trees on one core for this block, what they start meanwhile too; then as they were.

    Yields the names of what was pinned; what belongs to others and we are not root for is left out.
    """
    before = {}
    for root in roots:
        with suppress(OSError):
            before[root] = os.sched_getaffinity(root)
    names = set()
    try:
        for root in before:
            names |= _set_affinity(root, {core})
        yield sorted(names)
    finally:
        for root, cores in before.items():
            _set_affinity(root, cores)


def _set_affinity(root: int, cores: set[int]) -> set[str]:
    names = set()
    for process in trees_of([root]):
        with suppress(OSError):
            for thread in (PROC / str(process.pid) / "task").iterdir():
                with suppress(ProcessLookupError):  # it ended between the two
                    os.sched_setaffinity(int(thread.name), cores)
            names.add(process.name)
    return names


def _processes() -> Iterator[Process]:
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                said = (folder / "stat").read_text()
                name = said[said.index("(") + 1 : said.rindex(")")]
                fields = said[said.rindex(")") + 2 :].split()
                cpu_s = sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S
                yield Process(int(folder.name), name, int(fields[1]), cpu_s)


def _sockets_of(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                found.add(str(link.readlink()))
    return found
