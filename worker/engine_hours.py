"""Counts how long a worker's engine is held and how much of that it works: what an own engine costs.

The worker's parent counts, in a thread of its own: a Postgres that does not answer must not keep it from announcing
itself. What is counted goes to Postgres every 30 s, so a kill -9 loses no more than that.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from decimal import Decimal
from typing import Final

from inference.endpoint import Endpoint
from inference.supervisor import NOT_KNOWN, EngineReadings, parse_readings
from models.endpoints import NANOS
from runtime.errors import ServiceUnreachable, StokerError
from runtime.logs import get_logger
from store.database import Database
from store.engine_days import EngineTime, add_engine_time

log = get_logger(__name__)

LOOK_EVERY_S: Final = 5.0  # as often as the engine's watch reads /metrics
WRITE_EVERY_S: Final = 30.0
STOP_S: Final = 5.0
_HOUR_S: Final = 3600


class EngineHours(threading.Thread):
    """Adds an engine's time to its row until `stop`. `began_at`: when its start began, of the monotonic clock.

    `read` gives its last readings, `slots` are the sequences that it can run at once. `is_shared`: workers beside this
    one may use the same engine, which none of them started.
    """

    def __init__(
        self,
        postgres_url: str,
        *,
        engine_id: int,
        slots: int,
        hour_price: Decimal | None,
        is_shared: bool,
        read: Callable[[], EngineReadings],
        began_at: float,
    ) -> None:
        super().__init__(name="engine-hours", daemon=True)
        self._database = Database(postgres_url, pool_size=1)
        self._engine_id = engine_id
        self._slots = slots
        self._hour_price = hour_price or Decimal(0)
        self._is_shared = is_shared
        self._read = read
        self._counted_at = self._written_at = began_at
        self._unwritten = EngineTime()
        self._stop_wanted = threading.Event()

    def run(self) -> None:
        while not self._stop_wanted.wait(LOOK_EVERY_S):
            self._count(time.monotonic())
            if time.monotonic() - self._written_at >= WRITE_EVERY_S:
                self._write()
        self._count(time.monotonic())
        self._write()
        self._database.close()

    def stop(self) -> None:
        """Write what was counted and end the thread; a Postgres that does not answer is not waited for."""
        self._stop_wanted.set()
        self.join(timeout=STOP_S)

    def _count(self, now: float) -> None:
        seconds, self._counted_at = now - self._counted_at, now
        self._unwritten = added(self._unwritten, stretch(self._read(), seconds=seconds, slots=self._slots))

    def _write(self) -> None:
        self._written_at = time.monotonic()
        cost = int(self._hour_price * NANOS * Decimal(self._unwritten.up_s) / _HOUR_S)
        try:
            with self._database.transaction() as session:
                add_engine_time(session, self._engine_id, self._unwritten, cost=cost, is_shared=self._is_shared)
        except ServiceUnreachable as error:
            log.warning("engine_hours_wait", error=str(error))
            return
        self._unwritten = EngineTime()


class MetricsReader:
    """Readings of an engine that somebody else started, from its /metrics.

    One that answered without any, as managed providers do, is not asked again.
    """

    def __init__(self, url: str, *, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key
        self._has_none = False

    def read(self) -> EngineReadings:
        """What it says now; nothing while it does not answer."""
        if self._has_none:
            return NOT_KNOWN
        try:
            text = asyncio.run(self._ask())
        except StokerError:
            return NOT_KNOWN
        readings = parse_readings(text)
        self._has_none = readings.running is None
        return readings

    async def _ask(self) -> str:
        async with Endpoint(self._url, api_key=self._api_key, timeout_s=LOOK_EVERY_S, connections=1) as endpoint:
            return await endpoint.text("/metrics")


def stretch(readings: EngineReadings, *, seconds: float, slots: int) -> EngineTime:
    """So many seconds of an engine that these readings stand for; what they do not say is not counted."""
    running, gpu_use = readings.running, readings.gpu_use
    return EngineTime(
        up_s=seconds,
        busy_s=seconds if running else 0.0,
        slot_s=0.0 if running is None else seconds * min(running, slots),
        slots_s=0.0 if running is None else seconds * slots,
        gpu_s=0.0 if gpu_use is None else seconds * gpu_use,
        gpu_read_s=0.0 if gpu_use is None else seconds,
    )


def added(one: EngineTime, other: EngineTime) -> EngineTime:
    """Both stretches as one."""
    return EngineTime(*(first + second for first, second in zip(astuple(one), astuple(other), strict=True)))
