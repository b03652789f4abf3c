"""A few numbers that a worker's parent process shares with its prefork children and its express node, in memory.

Children do not hear of the parent's warm shutdown, and they are forked before the engine is up: so the
parent writes here, and they look.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import Final, Self

# Between two single requests of one person who reads and writes; after it the batches have the engine to themselves.
EXPRESS_S: Final = 30.0

_DRAINING = struct.Struct("B")
_ENGINE_ID = struct.Struct("q")
_ENGINE_ID_AT = 8
_SECONDS = struct.Struct("d")
_PRIORITISED_AT, _SINGLE_AT = 16, 24
_SERVICE_AT, _SERVICES = 64, 64  # a place for each child of the pool; with more of them, some share one


class SharedState:
    """Make it before the pool forks. Reads and writes are single aligned stores: no lock is needed."""

    def __init__(self) -> None:
        self._file = os.memfd_create("stoker-worker")  # no name on any disk: it goes with the last process that has it
        os.ftruncate(self._file, mmap.PAGESIZE)
        self._memory = mmap.mmap(self._file, mmap.PAGESIZE)

    @classmethod
    def at(cls, path: str) -> Self:
        """The one of another process, by the path that it states."""
        shared = cls.__new__(cls)
        shared._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        shared._memory = mmap.mmap(shared._file, mmap.PAGESIZE)
        return shared

    @property
    def path(self) -> str:
        """Where another process of this account finds it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def start_draining(self) -> None:
        """Tell the children to claim nothing more."""
        _DRAINING.pack_into(self._memory, 0, 1)

    def is_draining(self) -> bool:
        """Whether the worker is going down."""
        return bool(_DRAINING.unpack_from(self._memory, 0)[0])

    def set_engine_id(self, engine_id: int) -> None:
        """State which engine's row the results come from."""
        _ENGINE_ID.pack_into(self._memory, _ENGINE_ID_AT, engine_id)

    def prioritise(self) -> None:
        """State that the engine computes first what has a priority."""
        _DRAINING.pack_into(self._memory, _PRIORITISED_AT, 1)

    def is_prioritised(self) -> bool:
        """Whether it does."""
        return bool(_DRAINING.unpack_from(self._memory, _PRIORITISED_AT)[0])

    def saw_single(self) -> None:
        """State that there is a single request now."""
        _SECONDS.pack_into(self._memory, _SINGLE_AT, time.monotonic())  # one clock for all processes of a machine

    def has_singles(self) -> bool:
        """Whether there was one a short while ago, so that more are to be expected."""
        (seen,) = _SECONDS.unpack_from(self._memory, _SINGLE_AT)
        return bool(seen) and time.monotonic() - seen < EXPRESS_S

    def set_service_s(self, seconds: float, *, child: int) -> None:
        """State how long requests of this child take, by its place in the pool; 0 when it has just begun."""
        _SECONDS.pack_into(self._memory, _SERVICE_AT + child % _SERVICES * _SECONDS.size, seconds)

    def service_s(self) -> float:
        """How long the children's requests take, on average over those that know; 0 before the first answer."""
        places = self._memory[_SERVICE_AT : _SERVICE_AT + _SERVICES * _SECONDS.size]
        known = [seconds for (seconds,) in _SECONDS.iter_unpack(places) if seconds]
        return sum(known) / len(known) if known else 0.0

    def engine_id(self) -> int | None:
        """The engine's row, or None before it is known."""
        return int(_ENGINE_ID.unpack_from(self._memory, _ENGINE_ID_AT)[0]) or None
