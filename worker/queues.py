"""The broker's queues and the publisher of hints: the only module that speaks to the broker itself."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

from amqp import spec  # type: ignore[import-untyped]
from celery import Celery
from kombu import Connection, Producer, Queue
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from models.messages import AnswerSingle, Hint, Ingest, LookAtSchedules, RunSchedule, RunShard
from runtime.errors import ServiceUnreachable
from runtime.settings import without_secrets
from runtime.tracing import SHARD_ID, TRACEPARENT, Value, batch_span

DEAD_QUEUE = "stoker.dead"
# Waits of a leader that has leases to recover meanwhile. The sum of any two stays near 10 s.
CONNECT_S = 5
ANSWER_S = 5
CONFIRM_S = 8
BACKOFF_S = 5.0  # after an alarm or a silent broker; one that refuses connections is asked at every tick
SLOW_S = 1.0
_AMQP_TRANSPORT = {"read_timeout": ANSWER_S, "write_timeout": ANSWER_S, "confirm_publish": True}


def node_queue(name: str = RunShard.queue, *, delivery_limit: int) -> Queue:
    """A node's queue, on the default exchange: quorum, with an explicit delivery limit.

    RabbitMQ 3.x has no limit of its own and 4.x has 20: both behave alike here. A hint beyond it goes to the
    dead queue, which ends no job: its shard is dispatched again.
    """
    return Queue(
        name,
        routing_key=name,
        queue_arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": delivery_limit,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": DEAD_QUEUE,
        },
    )


def dead_queue() -> Queue:
    """Where hints end that were delivered too often; kept for people to look at, bounded."""
    return Queue(DEAD_QUEUE, routing_key=DEAD_QUEUE, queue_arguments={"x-max-length": 10_000})


class BrokerAlarm(OSError):
    """RabbitMQ takes no messages until an alarm of its memory or disk ends; says which."""


class _WatchedConnection(pyamqp.Connection):  # type: ignore[misc]  # kombu has no types
    """A connection whose pending call fails when the broker says that it blocks us, instead of waiting."""

    # py-amqp throws the reason away: it declares the method without its argument, a short string.
    _METHODS = {  # noqa: RUF012  # as in the class that it replaces
        **pyamqp.Connection._METHODS,
        spec.Connection.Blocked: spec.method(spec.Connection.Blocked, "s"),
    }

    def _on_blocked(self, reason: str) -> None:
        raise BrokerAlarm(reason)


class _WatchedTransport(pyamqp.Transport):  # type: ignore[misc]  # kombu has no types
    Connection = _WatchedConnection


class HintPublisher:
    """Publishes hints on a connection of its own, each confirmed by the broker.

    Declares the queues itself, so that submitting before the first worker starts loses no time. Every method
    raises ServiceUnreachable within about 10 s; after an alarm or a silence the next few seconds' calls raise at
    once, as a leader has more to do than to wait for the broker.
    """

    def __init__(self, app: Celery, *, delivery_limit: int) -> None:
        self._app = app
        self._queues = {
            name: node_queue(name, delivery_limit=delivery_limit)
            for name in (RunShard.queue, Ingest.queue, AnswerSingle.queue, LookAtSchedules.queue)
        } | {DEAD_QUEUE: dead_queue()}
        self._address = without_secrets(app.conf.broker_url)
        self._connection: Connection | None = None
        self._rests_until = 0.0
        self._failure = ""

    def publish(self, shards: Sequence[tuple[int, UUID]]) -> None:
        """One hint a shard; mandatory, so that a queue that is gone is an error and not a loss."""
        with self._producer() as producer:
            for shard_id, batch_id in shards:
                hint = RunShard(shard_id=shard_id, batch_id=str(batch_id))
                told: dict[str, Value] = {
                    "messaging.system": "celery",
                    "messaging.destination.name": hint.queue,
                    SHARD_ID: shard_id,
                }
                with batch_span("publish generation", batch_id, kind="producer", attributes=told) as span:
                    self._send(producer, hint, name=str(shard_id), traceparent=span.header)

    def invite(self, readers: int) -> None:
        """Let so many hints wait for readers of documents, those that are there included."""
        self._let_wait(Ingest(), readers, name="ingest")

    def call_express(self) -> None:
        """Let a hint wait for who answers single requests, if there is none: what was put before it is seen."""
        self._let_wait(AnswerSingle(), 1, name="single")

    def look_at_schedules(self) -> None:
        """Let a hint wait for who looks for due schedules, unless one waits there: all children are busy then."""
        self._let_wait(LookAtSchedules(), 1, name="look")

    def run_schedules(self, due: Sequence[RunSchedule]) -> None:
        """One hint a run."""
        with self._producer() as producer:
            for run in due:
                self._send(producer, run, name=f"{run.schedule}-{run.run_id}")

    def _let_wait(self, hint: Hint, count: int, *, name: str) -> None:
        missing = count - self.ready_count(hint.queue)
        with self._producer() as producer:
            for _ in range(missing):
                self._send(producer, hint, name=name)

    def ready_count(self, queue: str = RunShard.queue) -> int:
        """Hints in a queue that are delivered to no worker."""
        with self._channel() as connection:
            return int(self._queues[queue](connection.default_channel).queue_declare().message_count)

    def probe(self) -> None:
        """Publish a message that nobody gets; it fails under an alarm, which nothing but a publish shows."""
        with self._channel() as connection:
            queue = Queue("", exclusive=True, auto_delete=True)(connection.default_channel)
            queue.declare()
            with connection.Producer(serializer="json") as producer:
                producer.publish({}, exchange="", routing_key=queue.name, confirm_timeout=CONFIRM_S)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    @contextmanager
    def _producer(self) -> Iterator[Producer]:
        with self._channel() as connection, connection.Producer(serializer="json") as producer:
            yield producer

    @contextmanager
    def _channel(self) -> Iterator[Connection]:
        if time.monotonic() < self._rests_until:
            raise ServiceUnreachable(self._failure)
        began = time.monotonic()
        try:
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection
        except (
            OperationalError,
            OSError,
            *self._app.connection_for_write().connection_errors,
            *self._app.connection_for_write().channel_errors,
        ) as error:
            self._drop()
            self._failure = self._explain(error)
            if isinstance(error, BrokerAlarm) or time.monotonic() - began >= SLOW_S:
                self._rests_until = time.monotonic() + BACKOFF_S
            raise ServiceUnreachable(self._failure) from error

    def _send(self, producer: Producer, hint: Hint, *, name: str, traceparent: str | None = None) -> None:
        message = self._app.amqp.create_task_message(
            f"{name}-{secrets.token_hex(4)}",
            hint.wire_name,
            kwargs=hint.model_dump(),
            ignore_result=True,
            argsrepr=hint.shown,  # the two are for Flower alone
            kwargsrepr="",
        )
        producer.publish(
            message.body,
            exchange="",
            routing_key=hint.queue,
            mandatory=True,
            confirm_timeout=CONFIRM_S,
            headers=message.headers | ({} if traceparent is None else {TRACEPARENT: traceparent}),
            **message.properties,
        )

    def _explain(self, error: Exception) -> str:
        if isinstance(error, BrokerAlarm):
            setting = "disk_free_limit" if "disk" in str(error) else "vm_memory_high_watermark"
            return (
                f"the broker at {self._address} takes no messages, it is {error}; free that on its host or change "
                f"its {setting} (see `rabbitmqctl status`), then work goes on by itself"
            )
        return f"the broker at {self._address} does not answer: {error}; check STOKER_BROKER__URL"

    def _drop(self) -> None:
        """Let go of a connection without a goodbye, for whose answer a blocked one would wait."""
        if self._connection is not None:
            self._connection.collect()
            self._connection = None

    def _connect(self) -> Connection:
        connection = self._app.connection_for_write(connect_timeout=CONNECT_S)
        if connection.transport_cls in ("amqp", "pyamqp"):
            connection.transport_cls = _WatchedTransport
            connection.transport_options |= _AMQP_TRANSPORT
        try:
            connection.ensure_connection(max_retries=1, timeout=CONNECT_S)
            for queue in self._queues.values():
                queue(connection.default_channel).declare()
        except BaseException:
            connection.collect()
            raise
        return connection
