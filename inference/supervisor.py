"""Starting, watching and ending an engine process: the worker's own inference server.

A thread restarts it with backoff when it dies, stops answering /health, or makes no token for too long while
it has work; jobs in flight fail as EndpointDown and go back to Postgres. It must not know of jobs.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from inference.endpoint import Endpoint
from inference.engines import EnginePlan
from inference.gpus import GpuMeter
from runtime.children import spawn
from runtime.errors import Fatal, StokerError
from runtime.logs import get_logger

log = get_logger(__name__)

POLL_S = 1.0
READ_EVERY_S = 5.0
UNHEALTHY_AFTER_S = 30.0  # a front end under full load may miss a probe or two
BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 60.0)  # after starts that failed in a row; a prompt may kill a sound engine
STOP_GRACE_S = 10.0
LEFT_GRACE_S = 1.0  # for what the engine leaves: multiprocessing's resource tracker then unlinks its shared memory
LOG_TAIL_LINES = 15

_METRIC = re.compile(r"^(?:vllm:|llamacpp:)(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_RUNNING = ("num_requests_running", "requests_processing")
_WAITING = ("num_requests_waiting", "requests_deferred")
_TOKENS = ("generation_tokens_total", "tokens_predicted_total")
# The later two are older vLLM's and older llama.cpp's; today's llama.cpp does not tell it.
_KV_USE = ("kv_cache_usage_perc", "gpu_cache_usage_perc", "kv_cache_usage_ratio")


@dataclass(frozen=True, slots=True)
class EngineReadings:
    """What the engine's /metrics say; None where it does not.

    `kv_use` and `gpu_use` are shares, of its room for keys and values and of its GPUs' time; `tokens_per_s` is since
    the reading before.
    """

    running: int | None
    waiting: int | None
    generated_tokens: int | None
    kv_use: float | None = None
    tokens_per_s: float | None = None
    gpu_use: float | None = None


NOT_KNOWN: Final = EngineReadings(None, None, None)


class EngineSupervisor:
    """One engine process and the thread that watches it; in a `with` block it is up, and gone afterwards."""

    def __init__(self, plan: EnginePlan, *, log_file: Path, start_timeout_s: float, stall_s: float) -> None:
        self.plan = plan
        self.readings = NOT_KNOWN
        self.metrics_text = ""  # that the readings are from
        self.is_healthy = False
        self.restarts = 0
        self.version: str | None = None
        self._log_file = log_file
        self._start_timeout_s = start_timeout_s
        self._stall_s = stall_s
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._started = threading.Event()
        self._failure: StokerError | None = None
        self._gpus = GpuMeter(plan.env)
        self._read_at = self._healthy_at = self._progress_at = self._counted_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The running engine's process id."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Start the engine and wait until /health answers; raises Fatal with the end of its log if it does not."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the engine, all of its processes; returns when they are gone."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        """The watch thread; it also starts the engine, since the engine dies with the thread that started it."""
        try:
            asyncio.run(self._watch())
        except StokerError as error:
            self._failure = error
        finally:
            self.is_healthy = False
            self._gpus.close()
            self._end_child()
            if self._started.is_set() and not self._stop.is_set():
                log.critical("engine_watch_ended", engine=self.plan.kind)
                os.kill(os.getpid(), signal.SIGTERM)  # a worker without its engine must not go on taking hints
            self._started.set()

    async def _watch(self) -> None:
        await self._bring_up()
        self._started.set()
        failures = 0
        while not self._stop.is_set():
            reason = await self._fault()
            if reason is None:
                continue
            self.is_healthy = False
            log.error("engine_restarts", engine=self.plan.kind, reason=reason, restarts=self.restarts)
            self._end_child()
            self.readings, self.metrics_text = NOT_KNOWN, ""
            await self._sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            self.restarts += 1
            try:
                await self._bring_up()
                failures = 0
            except StokerError as error:
                failures += 1
                log.error("engine_start_failed", error=str(error))

    async def _bring_up(self) -> None:
        started = time.monotonic()
        if self._stop.is_set():
            return
        Path(self.plan.url.removeprefix("unix://")).unlink(missing_ok=True)
        try:
            self._child = spawn(
                self.plan.command, env=self.plan.env, log=self._log_file, session=True, guard_s=STOP_GRACE_S
            )
        except OSError as error:
            raise Fatal(f"the engine cannot be started: {error}") from error
        async with self._endpoint() as endpoint:
            while not await endpoint.is_healthy():
                if self._stop.is_set():
                    return
                if self._child.poll() is not None:
                    raise Fatal(
                        f"the engine ended with status {self._child.returncode} before it was up:\n{self._tail()}"
                    )
                if time.monotonic() - started > self._start_timeout_s:
                    raise Fatal(f"the engine was not up after {self._start_timeout_s:g} s:\n{self._tail()}")
                await self._sleep(0.2)
            self.version = await endpoint.version()
        self.is_healthy = True
        self._healthy_at = self._progress_at = time.monotonic()
        log.info(
            "engine_up",
            engine=self.plan.kind,
            version=self.version,
            alias=self.plan.alias,
            seconds=round(time.monotonic() - started, 1),
        )

    async def _fault(self) -> str | None:
        """Watch for one reading: why the engine must be restarted, or None."""
        await self._sleep(POLL_S)
        if self._stop.is_set():
            return None
        if self._child is None or self._child.poll() is not None:
            return "it ended" if self._child is None else f"it ended with status {self._child.returncode}"
        now = time.monotonic()
        if now < self._read_at:
            return None
        self._read_at = now + READ_EVERY_S
        try:
            async with self._endpoint() as endpoint:
                self.is_healthy = await endpoint.is_healthy()
                text = await endpoint.text("/metrics") if self.is_healthy else ""
        except StokerError:  # it died, or was too busy, between the two
            self.is_healthy, text = False, ""
        self.metrics_text = text
        gpu_use = self._gpus.read()
        if self.is_healthy:
            self._healthy_at = now
            return self._stalled(self._with_rates(parse_readings(text), gpu_use), now)
        self.readings = replace(self.readings, tokens_per_s=None, gpu_use=gpu_use)
        return "/health does not answer" if now - self._healthy_at > UNHEALTHY_AFTER_S else None

    def _with_rates(self, readings: EngineReadings, gpu_use: float | None) -> EngineReadings:
        """The readings with what they make of the ones before."""
        counted_at = time.monotonic()
        seconds, self._counted_at = counted_at - self._counted_at, counted_at
        rate = tokens_per_s(self.readings.generated_tokens, readings.generated_tokens, seconds=seconds)
        return replace(readings, tokens_per_s=rate, gpu_use=gpu_use)

    def _stalled(self, readings: EngineReadings, now: float) -> str | None:
        is_idle = not readings.running
        if is_idle or readings.generated_tokens != self.readings.generated_tokens:
            self._progress_at = now
        self.readings = readings
        if now - self._progress_at > self._stall_s:
            return f"no token for {self._stall_s:g} s with {readings.running} requests running"
        return None

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.plan.url, api_key=None, timeout_s=10.0, connections=1)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but end early when told to stop."""
        until = time.monotonic() + seconds
        while not self._stop.is_set() and time.monotonic() < until:
            await asyncio.sleep(min(0.1, seconds))  # a threading.Event cannot be awaited

    def _end_child(self) -> None:
        """End the engine's whole session: vLLM runs its core and workers as processes of their own."""
        child, self._child = self._child, None
        if child is None:
            return
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("engine_killed", engine=self.plan.kind)
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(child.pid, signal.SIGTERM)
            until = time.monotonic() + LEFT_GRACE_S
            while time.monotonic() < until:
                os.killpg(child.pid, 0)
                time.sleep(0.02)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def _tail(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines() if self._log_file.exists() else []
        return "\n".join(["  " + line for line in lines[-LOG_TAIL_LINES:]] + [f"  (whole log: {self._log_file})"])


def parse_readings(text: str) -> EngineReadings:
    """Readings from the Prometheus text of vLLM or llama.cpp; labelled series of one name are summed, shares averaged.

    Those that more than one reading makes are None.
    """
    series: dict[str, list[float]] = {}
    for name, value in _METRIC.findall(text):
        series.setdefault(name, []).append(float(value))

    def total(names: tuple[str, ...]) -> int | None:
        return next((int(sum(series[name])) for name in names if name in series), None)

    shares = next((series[name] for name in _KV_USE if name in series), None)
    kv_use = None if shares is None else min(1.0, max(0.0, sum(shares) / len(shares)))
    return EngineReadings(total(_RUNNING), total(_WAITING), total(_TOKENS), kv_use)


def tokens_per_s(before: int | None, after: int | None, *, seconds: float) -> float | None:
    """The rate between two readings of a counter; None if one is missing or the engine was started between them."""
    if before is None or after is None or after < before or seconds <= 0:
        return None
    return (after - before) / seconds
