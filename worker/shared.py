"""A few numbers that a worker's parent process shares with its prefork children, in anonymous memory.

Children do not hear of the parent's warm shutdown, and they are forked before the engine is up: so the
parent writes here, and they look.
"""

from __future__ import annotations

import mmap
import struct

_DRAINING = struct.Struct("B")
_ENGINE_ID = struct.Struct("q")
_ENGINE_ID_AT = 8
_SECONDS = struct.Struct("d")
_SERVICE_AT, _SERVICES = 64, 64  # a place for each child of the pool; with more of them, some share one


class SharedState:
    """Make it before the pool forks. Reads and writes are single aligned stores: no lock is needed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def start_draining(self) -> None:
        """Tell the children to claim nothing more."""
        _DRAINING.pack_into(self._memory, 0, 1)

    def is_draining(self) -> bool:
        """Whether the worker is going down."""
        return bool(_DRAINING.unpack_from(self._memory, 0)[0])

    def set_engine_id(self, engine_id: int) -> None:
        """State which engine's row the results come from."""
        _ENGINE_ID.pack_into(self._memory, _ENGINE_ID_AT, engine_id)

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
