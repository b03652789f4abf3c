"""A thread that keeps the leases of what this process holds, shards or documents, while the asyncio loop is busy.

It never decides anything: it extends leases and tells the attempt's owner what it has learned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from store.database import Database, Session
from store.shards import extend_leases

log = get_logger(__name__)

OnBeat = Callable[[bool | None], None]


class Held(Protocol):
    """A claim: `key` is the id and the fence."""

    @property
    def key(self) -> tuple[int, int]: ...


class Extend(Protocol):
    """Extends leases (id → fence): the ids that are still ours → whether they may go on."""

    def __call__(self, session: Session, fences: Mapping[int, int], *, lease_s: float) -> dict[int, bool]: ...


class Heartbeat:
    """Extends the leases of all claims added to it, every `interval_s`.

    `on_beat(runnable)` is called in the heartbeat's thread: runnable None means the fence is lost,
    False that a shard's batch was cancelled, paused or has expired.
    """

    def __init__(
        self, database: Database, *, lease_s: float, interval_s: float, extend: Extend = extend_leases
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._interval_s = interval_s
        self._extend = extend
        self._held: dict[tuple[int, int], OnBeat] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def add(self, claim: Held, on_beat: OnBeat) -> None:
        """Keep this claim's lease from now on."""
        with self._lock:
            self._held[claim.key] = on_beat

    def remove(self, claim: Held) -> None:
        """Let this claim's lease go."""
        with self._lock:
            self._held.pop(claim.key, None)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            with self._lock:
                held = dict(self._held)
            if held:
                try:
                    self._beat(held)
                except ServiceUnreachable as error:
                    log.warning("heartbeat_missed", error=str(error))
                except Exception:  # without this thread innocent jobs would run twice and end as poison
                    log.exception("heartbeat_defect")

    def _beat(self, held: dict[tuple[int, int], OnBeat]) -> None:
        with self._database.transaction() as session:
            alive = self._extend(session, dict(held.keys()), lease_s=self._lease_s)
        for (identifier, _), on_beat in held.items():
            on_beat(alive.get(identifier))
