"""How full an engine's slots are while a leg runs: its own /load and /metrics, read five times a second.

vLLM's gauges of running and waiting requests are no measure: they are as of the end of the last step, so that all slots
seem empty during the first one, which may take a second. /load counts the requests that are in the server now. It is
looked at from when submit has returned, so the moment between a batch's commit and its first request is mostly over.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from inference.endpoint import Endpoint
from runtime.errors import StokerError

EVERY_S: Final = 0.2
FLAG: Final = "--enable-server-load-tracking"
_ENDED: Final = re.compile(r"^vllm:request_success_total\{[^}]*\} ([0-9.eE+-]+)$", re.MULTILINE)


class SlotSampler:
    """`with SlotSampler(url, slots=…, jobs=…) as sampler: …; sampler.begin(); …`: the engine serves this leg alone.

    Its server must have been started with FLAG.
    """

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
        """Slots for which the engine had no request though jobs were unfinished, as a share of all slots' time."""
        if not self._missing:
            raise SystemExit(f"nothing was seen of the engine's slots: its server wants {FLAG}")
        return sum(self._missing) / (len(self._missing) * self._slots)

    async def _sample(self) -> None:
        async with Endpoint(self._url, api_key=None, timeout_s=10, connections=1) as endpoint:
            while not self._stop_wanted.is_set():
                with suppress(StokerError):  # a probe that was late is a sample less
                    self._take(await endpoint.text("/load"), await endpoint.text("/metrics"))
                await asyncio.sleep(EVERY_S)

    def _take(self, load: str, metrics: str) -> None:
        at_the_engine = int(json.loads(load)["server_load"])
        ended = sum(int(float(value)) for value in _ENDED.findall(metrics))
        if self._ended_before is None:
            self._ended_before = ended
        unfinished = self._jobs - (ended - self._ended_before)
        if unfinished > 0 and self._has_jobs.is_set():
            self._missing.append(max(0, min(self._slots, unfinished) - at_the_engine))
