"""The broker's queues and the publisher of hints: the only module that speaks to the broker itself."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

from celery import Celery
from kombu import Connection, Queue
from kombu.exceptions import OperationalError

from models.messages import RunShard
from runtime.errors import ServiceUnreachable
from runtime.settings import without_secrets

DEAD_QUEUE = "stoker.dead"
CONFIRM_S = 10


def node_queue(*, delivery_limit: int) -> Queue:
    """The generation node's queue, on the default exchange: quorum, with an explicit delivery limit.

    RabbitMQ 3.x has no limit of its own and 4.x has 20: both behave alike here. A hint beyond it goes to the
    dead queue, which ends no job: its shard is dispatched again.
    """
    return Queue(
        RunShard.queue,
        routing_key=RunShard.queue,
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


class HintPublisher:
    """Publishes RunShard hints on a connection of its own, each confirmed by the broker.

    Declares the queues itself, so that submitting before the first worker starts loses no time.
    """

    def __init__(self, app: Celery, *, delivery_limit: int) -> None:
        self._app = app
        self._queues = (node_queue(delivery_limit=delivery_limit), dead_queue())
        self._address = without_secrets(app.conf.broker_url)
        self._connection: Connection | None = None

    def publish(self, shards: Sequence[tuple[int, UUID]]) -> None:
        """One hint a shard; mandatory, so that a queue that is gone is an error and not a loss."""
        with self._channel() as connection, connection.Producer(serializer="json") as producer:
            for shard_id, batch_id in shards:
                hint = RunShard(shard_id=shard_id, batch_id=str(batch_id))
                message = self._app.amqp.create_task_message(
                    f"{shard_id}-{secrets.token_hex(4)}",
                    RunShard.wire_name,
                    kwargs=hint.model_dump(),
                    ignore_result=True,
                )
                producer.publish(
                    message.body,
                    exchange="",
                    routing_key=RunShard.queue,
                    mandatory=True,
                    confirm_timeout=CONFIRM_S,
                    headers=message.headers,
                    **message.properties,
                )

    def ready_count(self) -> int:
        """Hints in the queue that are delivered to no worker."""
        with self._channel() as connection:
            return int(self._queues[0](connection.default_channel).queue_declare().message_count)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    @contextmanager
    def _channel(self) -> Iterator[Connection]:
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
            self.close()
            raise ServiceUnreachable(
                f"the broker at {self._address} does not answer: {error}; check STOKER_BROKER__URL"
            ) from error

    def _connect(self) -> Connection:
        connection = self._app.connection_for_write(connect_timeout=5)
        connection.ensure_connection(max_retries=1, timeout=5)
        for queue in self._queues:
            queue(connection.default_channel).declare()
        return connection
