"""Who waits for a table in Postgres, and how long: what a migration costs those who work."""

from __future__ import annotations

import threading
from typing import Final, Self

import psycopg

LOOK_S: Final = 0.05
# The migration's own waits are not those of workers.
_WAITING: Final = """
SELECT pid, extract(epoch FROM waitstart), extract(epoch FROM clock_timestamp())
FROM pg_locks WHERE locktype = 'relation' AND NOT granted AND mode <> 'AccessExclusiveLock' AND waitstart IS NOT NULL
"""


class TableWaits:
    """Looks every 50 ms in a thread of its own until the end of the block."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._seen: dict[tuple[int, float], float] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def within(self, began: float, end: float) -> list[float]:
        """The waits that began in that time (seconds of the epoch), in seconds; up to 50 ms longer than was seen."""
        return [last - since for (_, since), last in self._seen.items() if began <= since < end]

    def _look(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._is_over.wait(LOOK_S):
                for pid, since, now in connection.execute(_WAITING).fetchall():
                    self._seen[int(pid), float(since)] = float(now)
