"""Every metric of Stoker, by name and unit, and where its numbers are kept so that all processes of one tree add up.

Prometheus's client writes each process's numbers into files of a folder that a parent makes before it forks or starts
others; the parent answers for all of them (`serve`). Until a process has opened such a folder, counting does nothing.
Postgres is the truth of what was done: a process that is killed between a commit and its count leaves that out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from runtime.logs import get_logger
from runtime.settings import MetricsSettings

log = get_logger(__name__)

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"  # the client's own: children that are started find it there

_SECONDS: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `over` says what becomes of a gauge's values in several processes.

    livemin there is none: a process that never set a gauge states 0 for it after a fork.
    """

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    over: Literal["livesum", "livemax", "livemostrecent"] = "livesum"
    buckets: tuple[float, ...] = _SECONDS

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count so much more, of a counter; a gauge goes up, or down."""
        if _counting:
            _child(self, labels).inc(amount)

    def set(self, value: float, **labels: str) -> None:
        """What a gauge stands at now, in this process."""
        if _counting:
            _child(self, labels).set(value)

    def observe(self, value: float, **labels: str) -> None:
        """One more value of a histogram."""
        if _counting:
            _child(self, labels).observe(value)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric("counter", name, text, labels)


def _gauge(
    name: str,
    text: str,
    *labels: str,
    over: Literal["livesum", "livemax", "livemostrecent"] = "livesum",
) -> Metric:
    return Metric("gauge", name, text, labels, over)


def _seconds(name: str, text: str, *labels: str) -> Metric:
    return Metric("histogram", name, text, labels)


# Jobs and shards, by the workers of the generation node.
JOBS = _counter("stoker_jobs_total", "Results committed.", "outcome", "source")
TOKENS = _counter("stoker_tokens_total", "Tokens of committed results, by prompt, completion or cached.", "kind")
RETRIES = _counter("stoker_job_retries_total", "Tries of jobs that failed and are to be tried again.")
SHARD_SECONDS = _seconds("stoker_shard_seconds", "From a shard's claim to its last write.")
WRITE_SECONDS = _seconds("stoker_write_seconds", "One transaction of results.")
FENCES_LOST = _counter("stoker_fences_lost_total", "Attempts that another one took over: their work is repeated.")
SHARDS_RUNNING = _gauge("stoker_shards_running", "Shards that workers hold.")

# Requests to engines and other endpoints.
REQUESTS = _counter(
    "stoker_requests_total", "Requests sent, by what came: ok, throttled, failed, down.", "endpoint", "outcome"
)
REQUEST_SECONDS = _seconds("stoker_request_seconds", "From a request's sending to the end of its answer.", "endpoint")
REQUESTS_RUNNING = _gauge("stoker_requests_running", "Requests under way.", "endpoint")
COST = _counter("stoker_cost_total", "What endpoints that bill tokens asked, in STOKER_COST__CURRENCY.", "endpoint")

# The caches.
LOOKUPS = _counter(
    "stoker_cache_lookups_total", "Jobs looked up, by what was found: exact, semantic, duplicate, none.", "found"
)

# The engine that a worker started or watches.
ENGINE_HEALTHY = _gauge("stoker_engine_healthy", "1 while the worker's engine answers.", over="livemostrecent")
ENGINE_RUNNING = _gauge("stoker_engine_sequences_running", "Sequences that the engine computes.")
ENGINE_SLOTS = _gauge("stoker_engine_sequences_max", "Sequences that it can compute at once.")
ENGINE_RESTARTS = _counter("stoker_engine_restarts_total", "Starts of the engine after its first.")
GPU_USE = _gauge("stoker_gpu_use_ratio", "Of the GPUs' time, the mean, 0 to 1.", over="livemax")

# What the dispatch leader knows; other processes have no such series.
LEADER = _gauge("stoker_dispatch_leader", "1 in the process that leads dispatch.")
BATCHES = _gauge("stoker_batches", "Batches that have not ended.", "state")
JOBS_LEFT = _gauge("stoker_jobs_unfinished", "Jobs of live batches without a result.")
AT_RISK = _gauge(
    "stoker_batches_at_risk", "Batches that will not be done in their window at the pace of the last minute."
)
SLACK = _gauge(
    "stoker_deadline_slack_seconds",
    "The least of: time left less time needed, of batches with a window.",
    over="livemostrecent",
)
PAUSED = _gauge("stoker_batches_paused", "Batches that were paused because their first jobs failed.")
WINDOW = _gauge("stoker_dispatch_window", "Hints that may wait with the broker: children of live workers.")
HINTS_READY = _gauge("stoker_hints_ready", "Hints in the broker that no worker has.")
HINTS_RESENT = _counter("stoker_hints_resent_total", "Hints that were lost and sent again.")
LEASES_RECOVERED = _counter("stoker_leases_recovered_total", "Shards whose worker died.")
SWEEP_SECONDS = _seconds("stoker_dispatch_sweep_seconds", "One look of the leader at everything.")

# The gateway.
HTTP_REQUESTS = _counter("stoker_http_requests_total", "Requests answered, by route.", "method", "route", "status")
HTTP_SECONDS = _seconds("stoker_http_request_seconds", "From a request's head to the end of its answer.", "route")
SINGLES = _counter("stoker_single_requests_total", "Single requests answered by the express node.", "outcome")
SINGLE_SECONDS = _seconds("stoker_single_request_seconds", "From their claim to their answer.")
WEBHOOKS = _counter("stoker_webhook_tries_total", "Deliveries tried.", "outcome")

# Documents.
DOCUMENTS = _counter("stoker_documents_total", "Documents read.", "outcome")
PASSAGES = _counter("stoker_passages_total", "Passages stored.")

# Schedules.
SCHEDULE_RUNS = _counter("stoker_schedule_runs_total", "Runs that ended.", "schedule", "outcome")
SCHEDULE_LATE = _seconds("stoker_schedule_late_seconds", "From a due time to the begin of its run.")
SCHEDULE_SUCCESS = _gauge(
    "stoker_schedule_last_success_timestamp_seconds", "When a run last succeeded.", "schedule", over="livemax"
)
SCHEDULE_LOOK = _gauge(
    "stoker_schedule_last_look_timestamp_seconds", "When due schedules were last looked for.", over="livemax"
)

# Observability itself.
SPANS_LOST = _counter("stoker_spans_lost_total", "Spans that no receiver took; they cost nothing else.")

CATALOGUE: Final[Sequence[Metric]] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class MetricsServer:
    """Answers at /metrics for a tree of processes, from a thread of the one that began it."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], server: Any) -> None:
        self._folder = folder
        self._server = server

    def stop(self) -> None:
        """Answer no more, and forget the numbers."""
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()


def open_metrics(settings: MetricsSettings) -> tempfile.TemporaryDirectory[str] | None:
    """Count from now on, in this process and in those that it forks or starts with its environment.

    The folder of the numbers where this process is the first of its tree, whose end it must not outlive; None where
    another began, or where no port is set: then nothing is counted.
    """
    folder = None
    if FOLDER_VARIABLE not in os.environ:
        if settings.port is None:
            return None
        folder = tempfile.TemporaryDirectory(prefix="stoker-metrics-")
        os.environ[FOLDER_VARIABLE] = folder.name
    _counting.append(True)
    return folder


def serve_metrics(
    settings: MetricsSettings,
    folder: tempfile.TemporaryDirectory[str],
    *,
    foreign: Callable[[], str] = str,
) -> MetricsServer | None:
    """Answer for the whole tree; call it after the fork. None, and a warning, if the port cannot be had.

    `foreign` gives the metrics of others, such as the engine's, in Prometheus's text format; they come along.
    """
    from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415  # after the folder is known

    registry = CollectorRegistry()
    registry.register(_Tree(folder.name, foreign))
    try:
        server, _ = start_http_server(settings.port or 0, addr=settings.host, registry=registry)
    except OSError as error:
        log.warning("metrics_not_served", host=settings.host, port=settings.port, error=str(error))
        return None
    log.info("metrics_served", host=settings.host, port=settings.port)
    return MetricsServer(folder, server)


class _Tree:
    """What all processes of a tree counted, those that have ended included; of gauges only the living."""

    def __init__(self, folder: str, foreign: Callable[[], str]) -> None:
        self._folder = folder
        self._foreign = foreign

    def describe(self) -> list[Any]:
        """Nothing in advance: names depend on what was counted."""
        return []

    def collect(self) -> Iterator[Any]:
        """Every metric family."""
        from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead  # noqa: PLC0415
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

        for pid in {int(file.stem.rpartition("_")[2]) for file in Path(self._folder).glob("gauge_live*.db")}:
            if not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
                mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]
        yield from MultiProcessCollector(None, self._folder).collect()  # type: ignore[no-untyped-call]
        try:
            yield from list(text_string_to_metric_families(self._foreign()))
        except ValueError as error:
            log.warning("foreign_metrics_unreadable", error=str(error))


_counting: list[bool] = []
_made: dict[str, Any] = {}
_children: dict[tuple[str, ...], Any] = {}


def _child(metric: Metric, labels: dict[str, str]) -> Any:
    """The client's object, made at its first use: one that a process never uses is none of its."""
    key = (metric.name, *(labels[name] for name in metric.labels))
    found = _children.get(key)
    if found is None:
        made = _made.get(metric.name) or _made.setdefault(metric.name, _client_metric(metric))
        found = _children[key] = made.labels(*key[1:]) if metric.labels else made
    return found


def _client_metric(metric: Metric) -> Any:
    import prometheus_client  # noqa: PLC0415  # it looks at its folder when it is imported

    registry = prometheus_client.CollectorRegistry()
    if metric.kind == "counter":
        return prometheus_client.Counter(metric.name, metric.help, metric.labels, registry=registry)
    if metric.kind == "histogram":
        return prometheus_client.Histogram(
            metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
        )
    return prometheus_client.Gauge(
        metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=metric.over
    )
