"""What a worker's parent answers at /metrics: the counts of all its processes, its engine's state, the engine's own.

It must not ask the engine: its watch did some seconds ago, and Prometheus does not wait for one that hangs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.bootsteps import StartStopStep
from celery.worker.components import Pool

from runtime.metrics import (
    ENGINE_HEALTHY,
    ENGINE_RESTARTS,
    ENGINE_RUNNING,
    ENGINE_SLOTS,
    GPU_USE,
    MetricsServer,
    open_metrics,
    serve_metrics,
)
from runtime.settings import MetricsSettings

if TYPE_CHECKING:
    from worker.steps import WorkerParts


class WorkerMetrics:
    """A worker's counting, from before its pool's fork to its end; without a port it does nothing."""

    def __init__(self, settings: MetricsSettings) -> None:
        self._settings = settings
        self._folder = open_metrics(settings)
        self._server: MetricsServer | None = None
        self._restarts = 0

    def serve(self, parts: WorkerParts) -> None:
        """Answer from now on, unless the worker beside which this node is does."""
        if self._folder is not None:
            self._server = serve_metrics(
                self._settings,
                self._folder,
                refresh=lambda: self._refresh(parts),
                foreign=lambda: parts.engine.metrics_text if parts.engine is not None else "",
            )

    def stop(self) -> None:
        """Answer no more, and remove the counts."""
        if self._server is not None:
            self._server.stop()
        elif self._folder is not None:
            self._folder.remove()

    def _refresh(self, parts: WorkerParts) -> None:
        readings = parts.readings()
        if parts.engine is not None:
            ENGINE_HEALTHY.set(parts.engine.is_healthy)
            ENGINE_RESTARTS.add(parts.engine.restarts - self._restarts)
            self._restarts = parts.engine.restarts
            ENGINE_RUNNING.set(readings.running or 0)  # one that is away computes none
        elif readings.running is not None:
            ENGINE_RUNNING.set(readings.running)
        if parts.has_engine and parts.engine_url:
            ENGINE_SLOTS.set(parts.engine_slots)
        if readings.gpu_use is not None:
            GPU_USE.set(readings.gpu_use)


class MetricsStep(StartStopStep):  # type: ignore[misc]  # celery has no types
    """Answers at /metrics from before the engine is up, so that one which does not come up can be seen."""

    requires = {Pool}  # noqa: RUF012  # celery's own protocol

    def start(self, worker: Any) -> None:
        """Begin to answer."""
        parts: WorkerParts = worker.app.stoker_parts
        if parts.metrics is not None:
            parts.metrics.serve(parts)
