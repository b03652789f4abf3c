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

    def engine_id(self) -> int | None:
        """The engine's row, or None before it is known."""
        return int(_ENGINE_ID.unpack_from(self._memory, _ENGINE_ID_AT)[0]) or None
