"""Services under pressure: what the publisher and doctor say of them, and how soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from runtime.errors import ServiceUnreachable
from runtime.settings import BrokerSettings, PostgresSettings, Settings
from tests.support.own_services import OwnPostgres, OwnRabbitMQ, server_folder, small_disk
from tests.support.waiting import wait_until
from worker.celery_app import make_app
from worker.doctor import Finding, examine
from worker.queues import HintPublisher


@pytest.fixture(scope="module")
def rabbit() -> Iterator[OwnRabbitMQ]:
    with server_folder() as folder, OwnRabbitMQ(folder / "rabbitmq") as node:
        yield node


def settings_for(*, broker: str = "amqp://guest@127.0.0.1:1//", postgres: str | None = None) -> Settings:
    return Settings.model_construct(broker=BrokerSettings(url=broker), postgres=PostgresSettings(url=postgres))


def publisher_for(url: str) -> HintPublisher:
    return HintPublisher(make_app(settings_for(broker=url)), delivery_limit=20)


def finding(settings: Settings, what: str) -> Finding:
    return next(found for found in examine(settings) if found.what == what)


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except ServiceUnreachable:
        return False
    return True


def test_an_alarm_fails_a_publish_at_once_and_the_next_calls_do_not_ask(rabbit: OwnRabbitMQ) -> None:
    publisher = publisher_for(rabbit.url)
    publisher.publish([(1, uuid4())])
    rabbit.raise_alarm()
    try:
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match=r"low on memory; .*vm_memory_high_watermark"):
            publisher.publish([(2, uuid4())])
        assert time.monotonic() - began < 10
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="low on memory"):
            publisher.ready_count()
        assert time.monotonic() - began < 0.1
    finally:
        rabbit.end_alarm()
    wait_until(lambda: works(lambda: publisher.publish([(3, uuid4())])), 20, "it publishes again")
    assert publisher.ready_count() >= 2
    publisher.close()


def test_doctor_names_the_brokers_alarm_and_its_end(rabbit: OwnRabbitMQ) -> None:
    settings = settings_for(broker=rabbit.url)
    rabbit.raise_alarm()
    try:
        found = finding(settings, "broker")
        assert "takes no messages, it is low on memory" in found.found
        assert "vm_memory_high_watermark" in found.remedy
    finally:
        rabbit.end_alarm()
    wait_until(lambda: finding(settings, "broker").is_well, 20, "doctor finds it well")


def test_a_broker_that_accepts_and_says_nothing_costs_ten_seconds_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        publisher = publisher_for(f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//")
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="does not answer"):
            publisher.ready_count()
        assert time.monotonic() - began < 13
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="does not answer"):
            publisher.publish([(1, uuid4())])
        assert time.monotonic() - began < 0.1


def test_doctor_says_that_postgres_has_no_connection_left() -> None:
    with server_folder() as folder, OwnPostgres(folder / "rows", max_connections=3) as postgres, ExitStack() as held:
        settings = settings_for(postgres=postgres.url)
        for _ in range(3):
            held.enter_context(psycopg.connect(postgres.url))
        found = finding(settings, "postgres")
        assert "has no free connection" in found.found
        assert "max_connections" in found.remedy
        held.close()
        wait_until(lambda: finding(settings, "postgres disk").is_well, 10, "doctor finds it well")


def fill(folder: Path) -> Path:
    """Take all the room that is left there; the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 16))
    return ballast


def test_doctor_says_that_postgres_disk_is_full() -> None:
    with server_folder() as folder, small_disk(32) as disk, OwnPostgres(folder / "rows") as postgres:
        settings = settings_for(postgres=postgres.database_on(disk))
        assert finding(settings, "postgres disk").is_well
        ballast = fill(disk)
        found = finding(settings, "postgres disk")
        assert "its disk is full" in found.found
        assert "free space" in found.remedy
        ballast.unlink()
        assert finding(settings, "postgres disk").is_well
