"""One Celery task per prompt, as its manual shows it and as fast as that goes.

    python -m benchmarks.peers.celery_per_prompt --broker URL --database URL --endpoint URL --pool-size 32

What was chosen, so that nothing but the shape differs from ours:
- The same client: our Endpoint (httptools, uvloop, one connection kept open) and the same reading of its answers. A
  Celery task is synchronous, so each pool process has a loop of its own and runs one request at a time on it.
- The same servers and the same durability: a quorum queue, JSON, acks late, one INSERT committed a job into a table
  like `results` in the same database. ON CONFLICT DO NOTHING, since a redelivery may repeat a job.
- In its favour: no result backend, no events, no gossip, mingle or heartbeats, no rate limits, no delayed-delivery
  queues; a prefetch of 4 a process (with 1 each waits for its ack's round trip; more only makes a crash repeat more);
  each process connects before the clock starts; messages are published before it, raw and unconfirmed; the first 5% of
  the jobs are left out of its time.
- Threads take part beside three sizes of prefork and have a row of their own. They are the fastest, but now and then
  such a worker gets no message any more, for good, as if acks were lost (many threads send them over one connection);
  its leg is then run again. A warm shutdown of it repeats what was running (docs/decisions/0003-celery.md).
It must not be started by hand for more than a look: benchmarks/peers/celery_leg.py gives it its messages.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import psycopg
import uvloop
from celery import Celery, signals
from kombu import Queue

from benchmarks.batch_lines import ENDPOINT
from inference.endpoint import Endpoint
from inference.replies import result_of

APPLICATION_NAME = "one celery task per prompt"
TASK, QUEUE, IDLE_QUEUE = "peer.ask", "peer", "peer.idle"
PREFETCH = 4
INSERT = (
    "INSERT INTO peer_results (batch_id, seq, outcome, source, status_code, response, prompt_tokens, "
    "completion_tokens, cached_tokens, reasoning_tokens, duration_ms) "
    "VALUES (%s, %s, %s, 'engine', %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pool process, or a thread, has for its tasks: a loop, a client, a connection that commits by itself."""

    runner: asyncio.Runner
    endpoint: Endpoint
    connection: psycopg.Connection

    @classmethod
    def made(cls, *, database: str, endpoint: str) -> Parts:
        """Connected; to be called after the fork."""
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        client = Endpoint(endpoint, api_key=None, timeout_s=60, connections=1)
        runner.run(client.__aenter__())
        return cls(runner, client, psycopg.connect(database, autocommit=True, application_name=APPLICATION_NAME))

    def ask(self, batch_id: str, seq: int, body: str) -> None:
        """Send one prompt and store its answer."""
        reply = self.runner.run(self.endpoint.post(ENDPOINT, body.encode(), request_id=f"{batch_id}-{seq}"))
        result = result_of(seq, ENDPOINT, reply)
        usage = result.usage
        counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens)
        values = (batch_id, seq, result.outcome.value, result.status_code, result.response, *counts, result.duration_ms)
        self.connection.execute(INSERT, values)


def make_app(broker: str, *, pool: str, pool_size: int) -> Celery:
    """The app without its task, as a publisher wants it."""
    app = Celery("peer", broker=broker)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=PREFETCH,
        worker_pool=pool,
        worker_concurrency=pool_size,
        worker_disable_rate_limits=True,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_consumer="worker.celery_app:Consumer",
        task_default_queue=QUEUE,
        task_create_missing_queues=False,
        task_queues=[
            Queue(QUEUE, routing_key=QUEUE, queue_arguments={"x-queue-type": "quorum"}),
            Queue(IDLE_QUEUE, routing_key=IDLE_QUEUE, queue_arguments={"x-queue-type": "quorum"}),
        ],
    )
    return app


def add_task(app: Celery, *, database: str, endpoint: str) -> None:
    """The task, and that pool processes connect when they start; threads do at their first task."""
    own = threading.local()

    def parts() -> Parts:
        if not hasattr(own, "parts"):
            own.parts = Parts.made(database=database, endpoint=endpoint)
        found: Parts = own.parts
        return found

    @app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator]
    def _ask(batch_id: str, seq: int, body: str) -> None:
        parts().ask(batch_id, seq, body)

    def connect(**_: Any) -> None:
        parts()

    signals.worker_process_init.connect(connect, weak=False)


def main() -> None:
    """Be the worker. It consumes from an idle queue until it is told of the other one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--pool", default="prefork")
    parser.add_argument("--pool-size", type=int, required=True)
    options = parser.parse_args()
    app = make_app(options.broker, pool=options.pool, pool_size=options.pool_size)
    add_task(app, database=options.database, endpoint=options.endpoint)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
    app.worker_main(["worker", "-Q", IDLE_QUEUE, *quiet])


if __name__ == "__main__":
    main()
