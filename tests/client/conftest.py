"""One gateway, one worker and one scripted endpoint for all tests of a module: starting them takes a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import kombu
import pytest

from models.states import Scope
from pipeline.keys import issue_key
from store.database import Database
from tests.conftest import QUEUES, empty_database
from tests.support.gateway_process import GatewayProcess
from tests.support.processes import WorkerProcess
from tests.support.scripted_endpoint import ScriptedEndpoint

FILE_BYTES = 200_000  # the largest upload that this gateway takes


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway that answers, a key for it, and the endpoint that its worker asks."""

    url: str
    api_key: str = field(repr=False)
    endpoint: ScriptedEndpoint
    database: Database


@pytest.fixture(scope="module")
def served(
    postgres_template: str, _vhost: str, _redis_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """All that a client needs, from a database to an engine."""
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        postgres_url = stack.enter_context(empty_database(postgres_template))
        endpoint = stack.enter_context(ScriptedEndpoint())
        env = _env(postgres_url, _vhost, _redis_database, endpoint.url, folder)
        stack.callback(_forget_queues, _vhost)
        database = Database(postgres_url)
        stack.callback(database.close)
        stack.enter_context(WorkerProcess("clients", env=env, folder=folder))
        gateway = stack.enter_context(GatewayProcess(env=env, folder=folder))
        with database.transaction() as session:
            key = issue_key(session, tenant="local", name="clients", scopes=(Scope.SUBMIT, Scope.READ)).key
        yield Served(f"{gateway.url}/v1", key.text, endpoint, database)


@pytest.fixture
def named(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The same, named by the environment as a notebook has it."""
    monkeypatch.setenv("STOKER_URL", served.url)
    monkeypatch.setenv("STOKER_API_KEY", served.api_key)
    return served


def _env(postgres_url: str, broker_url: str, redis_url: str, endpoint_url: str, folder: Path) -> dict[str, str]:
    return {
        "STOKER_POSTGRES__URL": postgres_url,
        "STOKER_BROKER__URL": broker_url,
        "STOKER_REDIS__URL": redis_url,
        "STOKER_HOME": str(folder / "home"),
        "STOKER_ENGINE__URL": endpoint_url,
        "STOKER_WORKER__IN_FLIGHT": "8",
        "STOKER_SHARD__MAX_JOBS": "16",
        "STOKER_WORKER__GRACE_S": "5",
        "STOKER_GATEWAY__FILE_BYTES": str(FILE_BYTES),
        "PATH": os.environ["PATH"],
    }


def _forget_queues(broker_url: str) -> None:
    with kombu.Connection(broker_url, connect_timeout=5) as connection:
        for queue in QUEUES:
            connection.default_channel.queue_delete(queue)
