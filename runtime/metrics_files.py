"""The files that counts are mapped from, with their room on the disk taken before it is written to.

Prometheus's client makes them sparse: on a full disk the kernel then kills whoever counts, by SIGBUS at the write.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from prometheus_client.mmap_dict import _INITIAL_MMAP_SIZE, MmapedDict

_AROUND_KEY: Final = 4 + 8 + 16  # its length before it, what fills it up to eight bytes, its value and time


class ReservedFile(MmapedDict):
    """The client's own file, which raises OSError where the disk has no room to make it or to let it grow."""

    def __init__(self, filename: str) -> None:
        with Path(filename).open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, file.tell() or _INITIAL_MMAP_SIZE)
        super().__init__(filename)  # type: ignore[no-untyped-call]

    def _init_value(self, key: str) -> None:
        wanted, room = self._used + len(key.encode()) + _AROUND_KEY, self._capacity
        while wanted > room:
            room *= 2
        if room > self._capacity:
            os.posix_fallocate(self._f.fileno(), 0, room)
        super()._init_value(key)  # type: ignore[no-untyped-call]
