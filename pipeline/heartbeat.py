"""A thread that keeps the leases of this process's shards, apart from the asyncio loop that may be busy.

It never decides anything: it extends leases and tells the attempt's owner what it has learned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from store.database import Database
from store.shards import Claim, extend_leases

log = get_logger(__name__)

OnBeat = Callable[[bool | None], None]


class Heartbeat:
    """Extends the leases of all claims added to it, every `interval_s`.

    `on_beat(runnable)` is called in the heartbeat's thread: runnable None means the fence is lost,
    False that the shard's batch was cancelled, paused or has expired.
    """

    def __init__(self, database: Database, *, lease_s: float, interval_s: float) -> None:
        self._database = database
        self._lease_s = lease_s
        self._interval_s = interval_s
        self._held: dict[tuple[int, int], tuple[Claim, OnBeat]] = {}
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

    def add(self, claim: Claim, on_beat: OnBeat) -> None:
        """Keep this claim's lease from now on."""
        with self._lock:
            self._held[claim.key] = (claim, on_beat)

    def remove(self, claim: Claim) -> None:
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

    def _beat(self, held: dict[tuple[int, int], tuple[Claim, OnBeat]]) -> None:
        with self._database.transaction() as session:
            alive = extend_leases(
                session, {claim.shard_id: claim.fence for claim, _ in held.values()}, lease_s=self._lease_s
            )
        for claim, on_beat in held.values():
            on_beat(alive.get(claim.shard_id))
