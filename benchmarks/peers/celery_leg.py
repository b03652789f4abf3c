"""One measurement of a Celery task per prompt: its worker is started, filled, run and ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
from celery import Celery

from benchmarks.batch_lines import bodies
from benchmarks.cores import processes, tree_cpu_s
from benchmarks.legs import Leg, server_cpu_s
from benchmarks.peers.celery_per_prompt import APPLICATION_NAME, QUEUE, TASK, make_app
from benchmarks.static_endpoint import MODEL, StaticEndpoint
from runtime.children import spawn, stop
from runtime.clock import uuid7
from runtime.settings import Settings

LEFT_OUT = 0.05  # of the jobs, at the beginning: the ramp
START_S, POLL_S = 120.0, 0.5
STALL_S = 20.0  # without a result: the slowest side has hundreds a second


class Stalled(Exception):
    """The worker has stopped for good before its jobs were done."""


def run_celery(
    settings: Settings, endpoint: StaticEndpoint, servers: dict[str, int], *, jobs: int, pool: str, pool_size: int
) -> Leg:
    """Jobs a second of a worker with this pool, and its CPU by stage; raises Stalled."""
    database = settings.require_postgres()
    app = make_app(settings.require_broker(), pool=pool, pool_size=pool_size)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS peer_results (LIKE results INCLUDING ALL)")
        with _worker(settings, endpoint, pool=pool, pool_size=pool_size) as worker:
            if pool == "prefork":
                _wait_connected(connection, pool_size)
            _wait_answers(app)
            batch_id = uuid7()
            publish(app, batch_id, jobs)
            connection.execute("CHECKPOINT")
            before = {**server_cpu_s(servers, endpoint.pid), "worker": tree_cpu_s(worker, processes())}
            app.control.add_consumer(QUEUE, reply=True, timeout=10, limit=1)  # with no limit it waits those 10 s
            _wait_done(connection, batch_id, jobs)
            after = {**server_cpu_s(servers, endpoint.pid), "worker": tree_cpu_s(worker, processes())}
        seconds = _seconds(connection, batch_id)
    counted = jobs - round(jobs * LEFT_OUT)
    return Leg.of(counted, seconds, {name: (after[name] - before[name]) / jobs * counted for name in after})


def publish(app: Celery, batch_id: UUID, jobs: int) -> None:
    """One message a prompt: raw, unconfirmed, which is 4 to 5 times as fast as `delay`."""
    with app.connection_for_write() as connection, connection.Producer(serializer="json") as producer:
        queue = app.amqp.queues[QUEUE](connection.default_channel)
        queue.declare()
        queue.purge()  # of what a worker that stalled has left
        for seq, body in enumerate(bodies(jobs, model=MODEL)):
            arguments = (str(batch_id), seq, body)
            message = app.amqp.create_task_message(f"{batch_id}-{seq}", TASK, args=arguments, ignore_result=True)
            producer.publish(
                message.body, exchange="", routing_key=QUEUE, headers=message.headers, **message.properties
            )


@contextmanager
def _worker(settings: Settings, endpoint: StaticEndpoint, *, pool: str, pool_size: int) -> Iterator[int]:
    """The pid of a worker for this block."""
    command = [sys.executable, "-m", "benchmarks.peers.celery_per_prompt"]
    command += ["--broker", settings.require_broker(), "--database", settings.require_postgres()]
    command += ["--endpoint", endpoint.url, "--pool", pool, "--pool-size", str(pool_size)]
    assert settings.home is not None
    worker = spawn(command, env=dict(os.environ), log=settings.home / "celery_per_prompt.log", session=True)
    try:
        yield worker.pid
    finally:
        stop(worker, grace_s=60)


def _wait_connected(connection: psycopg.Connection, pool_size: int) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
    end = time.monotonic() + START_S
    while (found := _number(connection, query, APPLICATION_NAME)) < pool_size:
        if time.monotonic() > end:
            raise SystemExit(f"{found} of {pool_size} pool processes of the Celery worker are connected")
        time.sleep(POLL_S)


def _wait_answers(app: Celery) -> None:
    end = time.monotonic() + START_S
    while not app.control.ping(timeout=1):
        if time.monotonic() > end:
            raise SystemExit("the Celery worker does not answer")


def _wait_done(connection: psycopg.Connection, batch_id: UUID, jobs: int) -> None:
    done, since = 0, time.monotonic()
    query = "SELECT count(*) FROM peer_results WHERE batch_id = %s"
    while (now_done := _number(connection, query, batch_id)) < jobs:
        if now_done > done:
            done, since = now_done, time.monotonic()
        elif time.monotonic() > since + STALL_S:
            raise Stalled(f"{done:,} of {jobs:,} jobs, and no other for {STALL_S:.0f} s")
        time.sleep(POLL_S)


def _seconds(connection: psycopg.Connection, batch_id: UUID) -> float:
    """From the end of what is left out to the last result."""
    row = connection.execute(
        "WITH numbered AS (SELECT created_at, percent_rank() OVER (ORDER BY created_at) AS place FROM peer_results "
        "WHERE batch_id = %s) SELECT extract(epoch FROM max(created_at) - min(created_at))::float8 FROM numbered "
        "WHERE place >= %s",
        (batch_id, LEFT_OUT),
    ).fetchone()
    assert row is not None
    return float(row[0])


def _number(connection: psycopg.Connection, query: str, *values: object) -> int:
    row = connection.execute(query, values).fetchone()
    assert row is not None
    return int(row[0])
