"""The real services, a part of each that is this run's alone, and nothing of it left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import hypothesis
import kombu
import psycopg
import pytest
import redis
from psycopg import sql
from sqlalchemy import make_url

from store.database import Database, libpq_url
from store.schema import migrate

POSTGRES = os.environ.get("STOKER_TEST_POSTGRES") or "postgresql://postgres@127.0.0.1:5432"
RABBITMQ = os.environ.get("STOKER_TEST_RABBITMQ") or "amqp://guest:guest@127.0.0.1:5672//"
REDIS = os.environ.get("STOKER_TEST_REDIS") or "redis://127.0.0.1:6379"
RUN = f"stoker_test_{uuid4().hex[:8]}"

REDIS_DATABASES = range(15, 0, -1)  # 0 is everybody's
REDIS_OWNER = "stoker:test:owner"
REDIS_HOURS_KEPT = 2  # for a run that was killed; its number is free again then
QUEUES = ("generation", "documents", "express", "control", "stoker.dead")

hypothesis.settings.register_profile("stoker", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("stoker")

# A shell's background job ignores SIGINT, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[str]:
    """The name of a migrated database, from which every test clones its own."""
    name = f"{RUN}_template"
    with _administrator() as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            database = Database(_url_of(name))
            migrate(database)
            database.close()
            yield name
        finally:
            _drop(admin, name)


@pytest.fixture
def postgres_url(postgres_template: str) -> Iterator[str]:
    """The URL of a migrated and empty database for this test alone."""
    with empty_database(postgres_template) as url:
        yield url


@contextmanager
def empty_database(postgres_template: str) -> Iterator[str]:
    """The URL of a migrated and empty database, gone after the block."""
    name = f"{RUN}_{uuid4().hex[:8]}"
    with _administrator() as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(postgres_template))
        )
        try:
            yield _url_of(name)
        finally:
            _drop(admin, name)


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    """Connections to this test's database, enough for tests with many threads."""
    opened = Database(postgres_url, pool_size=20)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def _redis_database() -> Iterator[str]:
    """The URL of a Redis database that was empty and that no other run of these tests uses."""
    for number in REDIS_DATABASES:
        url = f"{REDIS.rstrip('/')}/{number}"
        with redis.Redis.from_url(url) as client:
            if client.dbsize() == 0 and client.set(REDIS_OWNER, RUN, nx=True, ex=REDIS_HOURS_KEPT * 3600):
                try:
                    yield url
                finally:
                    _forget_keys(url)
                    client.delete(REDIS_OWNER)
                return
    pytest.fail(f"no free database in {REDIS}: all have keys")


@pytest.fixture
def redis_url(_redis_database: str) -> Iterator[str]:
    """The URL of an empty Redis database; the keys made in it go with the test."""
    _forget_keys(_redis_database)  # such as a module's worker that was killed has left: it is announced for 15 s
    yield _redis_database
    _forget_keys(_redis_database)


@pytest.fixture(scope="session")
def _vhost() -> Iterator[str]:
    """The URL of a virtual host of this run; the stated URL itself where rabbitmqctl is missing."""
    if shutil.which("rabbitmqctl") is None:
        yield RABBITMQ
        return
    parts = urlsplit(RABBITMQ)
    _rabbitmqctl("add_vhost", RUN)
    try:
        _rabbitmqctl("set_permissions", "-p", RUN, parts.username or "guest", ".*", ".*", ".*")
        yield urlunsplit((parts.scheme, parts.netloc, f"/{RUN}", "", ""))
    finally:
        _rabbitmqctl("delete_vhost", RUN)


@pytest.fixture
def broker_url(_vhost: str) -> Iterator[str]:
    """The URL of a broker without our queues; they go with the test."""
    yield _vhost
    with kombu.Connection(_vhost, connect_timeout=5) as connection:
        for queue in QUEUES:
            connection.default_channel.queue_delete(queue)


def _administrator() -> psycopg.Connection:
    return psycopg.connect(_url_of("postgres"), autocommit=True)


def _url_of(name: str) -> str:
    return libpq_url(make_url(POSTGRES).set(database=name))


def _drop(admin: psycopg.Connection, name: str) -> None:
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _forget_keys(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(count=1000):
            if key.decode() != REDIS_OWNER:
                client.delete(key)


def _rabbitmqctl(*words: str) -> None:
    subprocess.run(["rabbitmqctl", "--quiet", *words], check=True, timeout=60)
