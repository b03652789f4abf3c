"""A worker with a real vLLM, shared by the tests of a module: a start takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from tests.conftest import POSTGRES
from tests.support.own_services import OwnChroma, server_folder
from tests.support.processes import WorkerProcess

START_S = 240.0


class EngineRoom:
    """The settings of its workers, and one live worker at a time."""

    def __init__(self, env: dict[str, str], *, folder: Path, postgres_url: str) -> None:
        self.env = env
        self.postgres_url = postgres_url
        self._folder = folder
        self._worker: WorkerProcess | None = None

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def worker(self) -> WorkerProcess:
        """The live worker, started if there is none."""
        if self._worker is None or self._worker.status is not None:
            number = uuid4().hex[:4]
            self._worker = self._stack.enter_context(
                WorkerProcess(f"engine-{number}", env=self.env, folder=self._folder, ready_s=START_S)
            )
        return self._worker

    def engine_log(self, worker: WorkerProcess) -> str:
        """What the worker's engine wrote."""
        return (self._folder / "logs" / f"engine-{worker.pid}.log").read_text(errors="replace")


@pytest.fixture(scope="module")
def room(
    postgres_template: str, _vhost: str, _redis_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineRoom]:
    """Workers with vLLM and the default checkpoint, W8A8, on services of this module alone."""
    folder = tmp_path_factory.mktemp("engine")
    name = f"{postgres_template}_{uuid4().hex[:8]}"
    url = urlunsplit(urlsplit(POSTGRES)._replace(path=f"/{name}"))
    with psycopg.connect(POSTGRES, dbname="postgres", autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(postgres_template))
        )
        env = {
            "STOKER_POSTGRES__URL": url,
            "STOKER_BROKER__URL": _vhost,
            "STOKER_REDIS__URL": _redis_database,
            "STOKER_HOME": str(folder),
            "STOKER_ENGINE__KIND": "vllm",
            "STOKER_ENGINE__MAX_NUM_SEQS": "16",
            "STOKER_ENGINE__ARGS": "--enable-log-requests",
            "STOKER_WORKER__IN_FLIGHT": "8",
            "STOKER_WORKER__LEASE_S": "6",
            "STOKER_WORKER__HEARTBEAT_S": "2",
            "STOKER_SHARD__MAX_JOBS": "16",
            "COLUMNS": "200",
        }
        try:
            with (
                server_folder() as own,
                OwnChroma(own / "chroma") as chroma,
                EngineRoom(env | {"STOKER_CACHE__CHROMA_URL": chroma.url}, folder=folder, postgres_url=url) as opened,
            ):
                yield opened
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
