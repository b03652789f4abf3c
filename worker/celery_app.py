"""The Celery app: its settings, its node's one queue, its task, and the steps a worker process adds.

Settled by measurement (docs/decisions/0003-celery.md): prefork, late acks, prefetch of one, JSON only,
no result backend, no countdowns or retries. Recovery is the lease's, in Postgres; acks are flow control.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from celery.worker.consumer.consumer import Consumer as CeleryConsumer

from models.messages import AnswerSingle, Ingest, LookAtSchedules, RunSchedule, RunShard
from runtime.errors import EXIT_USAGE, BadInput
from runtime.logs import configure_logs
from runtime.redaction import secrets_of
from runtime.settings import Settings
from runtime.tracing import TRACEPARENT, check_tracing
from store.database import Database
from store.revisions import await_database
from tasks.control import look_at_schedules, run_one
from tasks.express import answer_singles
from tasks.generation import run_shard
from worker.child import Child
from worker.control import ControlChild
from worker.express import ExpressChild
from worker.metrics import MetricsStep, WorkerMetrics
from worker.queues import node_queue
from worker.shared import SharedState
from worker.steps import BeatStep, DispatchStep, EngineStep, ExpressStep, WorkerParts

if TYPE_CHECKING:
    from worker.reader import Reader

PROC_START_S = 60.0  # Celery kills a child that is not up in 4 s and forks another, on a busy machine for ever
# A visibility timeout above the longest task (yield after 10 min, then a request of at most 15 min); the two
# sweeps bring a killed worker's hint back in 6.7 s instead of 96 s. Read only by the Redis transport.
_REDIS_TRANSPORT = {"visibility_timeout": 1800, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    """Celery's consumer without delayed delivery: nothing here has an ETA, and it would declare 28 queues."""

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc]
        default_steps = tuple(step for step in CeleryConsumer.Blueprint.default_steps if "delayed_delivery" not in step)


def make_app(settings: Settings, *, shared: SharedState | None = None) -> Celery:
    """The app for workers and publishers; `shared` is the page of the worker beside which a node is.

    Raises BadInput if no broker is named.
    """
    broker_url = settings.require_broker()
    parts = WorkerParts(settings=settings, shared=SharedState() if shared is None else shared)
    queue = settings.worker.node  # each node has one, of its name
    app = Celery("stoker", broker=broker_url, set_as_current=True)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_default_queue=queue,
        task_create_missing_queues=False,
        task_queues=[node_queue(queue, delivery_limit=settings.broker.delivery_limit)],
        worker_pool="prefork",
        worker_proc_alive_timeout=PROC_START_S,
        worker_consumer="worker.celery_app:Consumer",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # No confirms on a worker's own connections: its events would wait for them as long as RabbitMQ has an alarm.
        broker_transport_options={} if broker_url.startswith("amqp") else _REDIS_TRANSPORT,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    _wire(app, parts)
    return app


def _wire(app: Celery, parts: WorkerParts) -> None:
    """Attach the task, the process signals and the bootsteps."""
    child: list[Child] = []
    express: list[ExpressChild] = []
    reader: list[Reader] = []
    control: list[ControlChild] = []

    @app.task(name=RunShard.wire_name, shared=False)  # type: ignore[untyped-decorator]
    def _run_shard(**message: Any) -> str:
        traceparent = app.current_task.request.get(TRACEPARENT)
        return run_shard(child[0].context, child[0].runner, RunShard.model_validate(message), traceparent=traceparent)

    @app.task(name=Ingest.wire_name, shared=False)  # type: ignore[untyped-decorator]
    def _ingest(**message: Any) -> str:
        from tasks.documents import read_documents  # noqa: PLC0415  # its libraries are an extra

        return read_documents(reader[0].context, reader[0].runner, Ingest.model_validate(message))

    # No events: as many as single requests come, they would fill Flower's memory of tasks and say nothing.
    @app.task(name=AnswerSingle.wire_name, shared=False, send_events=False)  # type: ignore[untyped-decorator]
    def _answer_singles(**message: Any) -> None:
        answer_singles(express[0].answering, express[0].loop, AnswerSingle.model_validate(message))

    # No events here either: one comes every few seconds.
    @app.task(name=LookAtSchedules.wire_name, shared=False, send_events=False)  # type: ignore[untyped-decorator]
    def _look_at_schedules(**message: Any) -> None:
        look_at_schedules(control[0].context, LookAtSchedules.model_validate(message))

    @app.task(name=RunSchedule.wire_name, shared=False)  # type: ignore[untyped-decorator]
    def _run_schedule(**message: Any) -> str | None:
        return run_one(control[0].context, RunSchedule.model_validate(message))

    starts: dict[str, Callable[[], None]] = {
        "generation": lambda: child.append(Child(parts)),
        "documents": lambda: reader.append(_reader(parts)),
        "express": lambda: express.append(ExpressChild(parts)),
        "control": lambda: control.append(ControlChild(parts, app)),
    }

    def end_child(**_: Any) -> None:
        for held in (child, express, reader, control):
            while held:
                held.pop().close()

    def size_pool(conf: Any, **_: Any) -> None:
        """Only a worker plans an engine: dispatchers and publishers, which use the app too, may have no checkpoint."""
        _require_tracing(parts)
        _await_schema(parts.settings)
        parts.metrics = WorkerMetrics(parts.settings.metrics)  # before the fork: its children count there
        conf.worker_concurrency = parts.children

    signals.celeryd_init.connect(size_pool, weak=False)
    signals.setup_logging.connect(lambda **_: _configure_logs(parts.settings), weak=False)
    signals.worker_process_init.connect(lambda **_: starts[parts.settings.worker.node](), weak=False)
    signals.worker_process_shutdown.connect(end_child, weak=False)
    signals.worker_shutting_down.connect(lambda **_: parts.drain(), weak=False)
    signals.worker_shutdown.connect(lambda **_: parts.end(), weak=False)
    app.steps["worker"].update({MetricsStep, EngineStep, DispatchStep, ExpressStep, BeatStep})
    app.stoker_parts = parts


def _require_tracing(parts: WorkerParts) -> None:
    """End this process with one line if its children are to record spans and cannot: Celery only logs what they raise.

    Only a generation worker's children do.
    """
    try:
        if parts.has_engine:
            check_tracing(parts.settings)
    except BadInput as error:
        print(f"stoker: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USAGE)


def _await_schema(settings: Settings) -> None:
    """Begin nothing on a schema that lacks what this version asks for, or while Postgres is away."""
    _configure_logs(settings)  # Celery has not asked for it yet
    database = Database(settings.require_postgres(), pool_size=1)
    try:
        await_database(database)
    finally:
        database.close()


def _configure_logs(settings: Settings) -> None:
    configure_logs(settings.log, secrets=secrets_of(settings))
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    """Not that a look began and ended well, every few seconds."""
    about: object = getattr(record, "data", None)
    is_look = isinstance(about, dict) and about.get("name") == LookAtSchedules.wire_name
    return not is_look or record.levelno > logging.INFO


def _reader(parts: WorkerParts) -> Reader:
    from worker.reader import Reader  # noqa: PLC0415  # its libraries are an extra

    return Reader(parts)
