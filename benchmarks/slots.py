"""How full an engine's slots are while a leg runs: its own /metrics, read five times a second."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from inference.endpoint import Endpoint
from inference.supervisor import parse_readings
from runtime.errors import StokerError

EVERY_S: Final = 0.2
_ENDED: Final = re.compile(r"^vllm:request_success_total\{[^}]*\} ([0-9.eE+-]+)$", re.MULTILINE)


class SlotSampler:
    """`with SlotSampler(url, slots=…, jobs=…) as sampler: …; sampler.begin(); …`: the engine serves this leg alone."""

    def __init__(self, url: str, *, slots: int, jobs: int) -> None:
        self._url, self._slots, self._jobs = url, slots, jobs
        self._missing: list[int] = []
        self._ended_before: int | None = None
        self._has_jobs = threading.Event()
        self._stop_wanted = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._sample()), name="slots", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_wanted.set()
        self._thread.join()

    def begin(self) -> None:
        """From now on jobs wait to be run."""
        self._has_jobs.set()

    @property
    def starvation(self) -> float:
        """Slots for which the engine had no request though jobs were unfinished, as a share of all slots' time.

        A request that waits in the engine has its slot at the next step: vLLM counts what runs when a step ends.
        """
        return sum(self._missing) / max(1, len(self._missing) * self._slots)

    async def _sample(self) -> None:
        async with Endpoint(self._url, api_key=None, timeout_s=10, connections=1) as endpoint:
            while not self._stop_wanted.is_set():
                with suppress(StokerError):  # a probe that was late is a sample less
                    self._take(await endpoint.metrics_text())
                await asyncio.sleep(EVERY_S)

    def _take(self, text: str) -> None:
        readings = parse_readings(text)
        if readings.running is None:
            return
        at_the_engine = readings.running + (readings.waiting or 0)
        ended = sum(int(float(value)) for value in _ENDED.findall(text))
        if self._ended_before is None:
            self._ended_before = ended
        unfinished = self._jobs - (ended - self._ended_before)
        if unfinished > 0 and self._has_jobs.is_set():
            self._missing.append(max(0, min(self._slots, unfinished) - at_the_engine))
