"""Every metric of Stoker, by name and unit, and where its numbers are kept so that all processes of one tree add up.

Prometheus's client writes each process's numbers into files of a folder that a parent makes before it forks or starts
others; the parent answers for all of them (`serve`). Until a process has opened such a folder, counting does nothing.
Postgres is the truth of what was done: a process that is killed between a commit and its count leaves that out.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal

from runtime.local_http import status_of
from runtime.logs import get_logger
from runtime.metrics_folder import FOLDER_VARIABLE, MetricsFolder, families_in, is_metrics_folder
from runtime.metrics_http import PATH, MetricsHttp
from runtime.settings import MetricsSettings

log = get_logger(__name__)

LOOK_S: Final = 2.0  # for an answer, which takes some ten ms

_OF_A_PROCESS: Final = ("python_", "process_")  # of the engine's; they would pass for ours
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
            _count(self, labels, amount, "inc")

    def set(self, value: float, **labels: str) -> None:
        """What a gauge stands at now, in this process."""
        if _counting:
            _count(self, labels, value, "set")

    def observe(self, value: float, **labels: str) -> None:
        """One more value of a histogram."""
        if _counting:
            _count(self, labels, value, "observe")


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
JOBS_LEFT = _gauge("stoker_jobs_unfinished", "Jobs without a result, of batches in progress that are not paused.")
AT_RISK = _gauge(
    "stoker_batches_at_risk", "Batches that will not be done in their window at the pace of the last minute."
)
SLACK = _gauge(
    "stoker_deadline_slack_seconds",
    "The least of: time left less time needed, of batches with a window.",
    over="livemostrecent",
)
PAUSED = _gauge("stoker_batches_paused", "Batches that were paused because their first jobs failed.")
WORKERS = _gauge("stoker_workers", "Live workers, by node; of the generation node those whose engine answers.", "node")
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
SCHEDULE_LATE = _seconds("stoker_schedule_late_seconds", "From the hint of a run to its begin.")
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

    def __init__(self, folder: MetricsFolder, server: MetricsHttp) -> None:
        self._folder = folder
        self._server = server

    def stop(self) -> None:
        """Answer no more, and forget the numbers."""
        self._server.shutdown()
        self._server.server_close()
        _forget(self._folder)


def open_metrics(settings: MetricsSettings) -> MetricsFolder | None:
    """Count from now on, in this process and in those that it forks or starts with its environment.

    The folder of the numbers where this process is the first of its tree, whose end it must not outlive; None where
    another began; or where no port is set or there is no room for it: then nothing is counted.
    """
    folder = None
    if not is_metrics_folder(os.environ.get(FOLDER_VARIABLE)):
        if settings.port is None:
            return None
        try:
            folder = MetricsFolder()
        except OSError as error:
            log.warning("metrics_not_kept", error=str(error))
            return None
        os.environ[FOLDER_VARIABLE] = folder.path
        _made.clear()
        _children.clear()
    if not _holds_at_forks:
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
        _holds_at_forks.append(True)
    _counting.append(True)
    return folder


def is_counting() -> bool:
    """Whether this process counts: for figures that cost something."""
    return bool(_counting)


def serve_metrics(
    settings: MetricsSettings,
    folder: MetricsFolder,
    *,
    refresh: Callable[[], None] = lambda: None,
    foreign: Callable[[], str] = str,
) -> MetricsServer | None:
    """Answer for the whole tree; call it after the fork. None, and a warning, if the port cannot be had.

    `refresh` is called before each answer, to set what this process knows at any moment. `foreign` gives the metrics of
    others, such as the engine's, in Prometheus's text format; they come along. Neither may wait for anything.
    """
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415

    registry = CollectorRegistry()
    registry.register(_Tree(folder.path, refresh, foreign))
    try:
        server = MetricsHttp(settings.host, settings.port or 0, lambda: generate_latest(registry))
    except OSError as error:
        log.warning("metrics_not_served", host=settings.host, port=settings.port, error=str(error))
        return None
    log.info("metrics_served", host=settings.host, port=settings.port)
    return MetricsServer(folder, server)


def answers_metrics(host: str, port: int) -> bool:
    """Whether somebody answers at /metrics there; one that listens everywhere is asked on this machine."""
    return status_of(host, port, PATH, timeout_s=LOOK_S) == HTTPStatus.OK


@contextmanager
def metrics_served(settings: MetricsSettings) -> Iterator[None]:
    """Count in this block, and answer for it unless another process of this tree does."""
    folder = open_metrics(settings)
    server = None if folder is None else serve_metrics(settings, folder)
    try:
        yield
    finally:
        if server is not None:
            server.stop()
        elif folder is not None:
            _forget(folder)


class _Tree:
    """What all processes of a tree counted, those that have ended included; of gauges only the living."""

    def __init__(self, folder: str, refresh: Callable[[], None], foreign: Callable[[], str]) -> None:
        self._folder = folder
        self._refresh = refresh
        self._foreign = foreign
        self._lock = threading.Lock()

    def describe(self) -> list[Any]:
        """Nothing in advance: names depend on what was counted."""
        return []

    def collect(self) -> Iterator[Any]:
        """Every metric family."""
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

        with self._lock:  # several may ask at once, and the files of the dead are put together
            self._refresh()
            yield from families_in(self._folder)
        try:
            foreign = list(text_string_to_metric_families(self._foreign()))
        except (ValueError, LookupError) as error:  # the parser cuts lines without looking
            log.warning("foreign_metrics_unreadable", error=str(error))
            return
        yield from (family for family in foreign if not family.name.startswith(_OF_A_PROCESS))


_counting: list[bool] = []
_holds_at_forks: list[bool] = []
_made: dict[str, Any] = {}
_children: dict[tuple[str, ...], Any] = {}

# The client's own locks are only held under this one, which no other thread holds at a fork: a pool forks again when a
# child has died, and its new child would wait for ever.
_lock = threading.Lock()

# What the client can raise where its folder is gone, its disk full or a file of it is not what it was.
_ITS_ERRORS: Final = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error)


def _count(metric: Metric, labels: dict[str, str], value: float, how: Literal["inc", "set", "observe"]) -> None:
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(labels)}")
    key = (metric.name, *(labels[name] for name in metric.labels))
    with _lock:
        if not _counting:
            return
        try:
            getattr(_child(metric, key), how)(value)
        except _ITS_ERRORS as error:  # the counting ends, and no work
            _counting.clear()
            why = f"{type(error).__name__}: {error}"
        else:
            return
    log.warning("metrics_end", metric=metric.name, error=why)


def _forget(folder: MetricsFolder) -> None:
    """The numbers go, so nothing more is counted."""
    with _lock:
        _counting.clear()
    folder.remove()


def _child(metric: Metric, key: tuple[str, ...]) -> Any:
    """The client's object, made at its first use: one that a process never uses is none of its."""
    found = _children.get(key)
    if found is None:
        made = _made.get(metric.name) or _made.setdefault(metric.name, _client_metric(metric))
        found = _children[key] = made.labels(*key[1:]) if metric.labels else made
    return found


def _client_metric(metric: Metric) -> Any:
    import prometheus_client  # noqa: PLC0415
    from prometheus_client import values  # noqa: PLC0415

    from runtime.metrics_files import ReservedFile  # noqa: PLC0415

    # It looks for its folder when it is imported, and Celery's command imports Flower's plugin, and that the client.
    # Each folder has a class of its own, which is made with its first metric.
    if not (_made and values.ValueClass._multiprocess):
        values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    vars(values)["MmapedDict"] = ReservedFile
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
