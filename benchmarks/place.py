"""Postgres, RabbitMQ and Redis for a benchmark alone, with their defaults: what they do is for it, pinned with it.

RabbitMQ comes from the system's package: `make rabbitmq` installs it.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import psycopg

from pipeline.cutting import for_workers
from runtime.settings import Settings, load_settings
from scripts.local import prepare_schema
from store.presence import ANNOUNCE_S, PresenceBoard
from tests.support.own_services import OwnPostgres, OwnRabbitMQ, OwnRedis, server_folder

ANNOUNCED_S = 2 * ANNOUNCE_S
DEFAULTS: Final[Mapping[str, str]] = MappingProxyType({})
MAX_CONNECTIONS = 300  # a Celery worker of 128 processes has one each


@dataclass(frozen=True, slots=True)
class Place:
    """Settings with these services' addresses; `servers` has the pid at the root of each, `folder` room for files."""

    settings: Settings
    servers: dict[str, int]
    folder: Path
    postgres_log: Path

    def versions(self) -> dict[str, str]:
        """Of the servers that say it cheaply."""
        with psycopg.connect(self.settings.require_postgres()) as connection:
            row = connection.execute("SHOW server_version").fetchone()
        said = subprocess.run(["rabbitmqctl", "version"], capture_output=True, text=True, check=False).stdout
        return {"postgres": str(row[0]) if row else "unknown", "rabbitmq": said.strip() or "unknown"}


def as_submitted(settings: Settings, *, is_fresh: bool = False) -> Settings:
    """What `stoker submit` would use now: shards as large as the live workers are fast.

    Waits until a worker has announced how long its requests take, as any that has worked for some seconds has;
    SystemExit if none does, since shards of another size would be measured. `is_fresh`: none has worked yet.
    """
    board, end = PresenceBoard(settings.require_redis()), time.monotonic() + ANNOUNCED_S
    try:
        while not is_fresh and not any(worker.service_s for worker in board.workers()):
            if time.monotonic() > end:
                raise SystemExit("no worker has announced how long its requests take")
            time.sleep(0.1)
        return for_workers(settings, board.workers())
    finally:
        board.close()


@contextmanager
def own_place(*, programs: Path | None = None, postgres: Mapping[str, str] = DEFAULTS) -> Iterator[Place]:
    """Services of this block's own, the schema in place; they start on the cores that this thread has.

    `programs` are of another Postgres than the system's, `postgres` its settings.
    From now on a SIGTERM ends the benchmark as Ctrl-C does, so that nothing it started stays.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if shutil.which("rabbitmq-server") is None:
        raise SystemExit("RabbitMQ is missing: `make rabbitmq` as root, or install your system's `rabbitmq-server`")
    settings = load_settings()
    with (
        server_folder() as folder,
        OwnPostgres(
            folder / "postgres", max_connections=MAX_CONNECTIONS, programs=programs, settings=postgres
        ) as server,
        OwnRedis(folder / "redis") as redis,
        OwnRabbitMQ(folder / "rabbitmq") as rabbitmq,
    ):
        urls = {"postgres": server.url, "broker": rabbitmq.url, "redis": redis.url}
        groups = {name: getattr(settings, name).model_copy(update={"url": url}) for name, url in urls.items()}
        home = folder / "home"
        home.mkdir()
        own = settings.model_copy(update={"home": home, **groups})
        prepare_schema(own)
        servers = {"postgres": server.pid, "rabbitmq": rabbitmq.pid, "redis": redis.pid}
        yield Place(own, servers, folder, server.log)
