"""What acceptance tests run on: the real services, a scripted endpoint, settings with short leases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import WorkerProcess
from tests.support.scripted_endpoint import ScriptedEndpoint


@pytest.fixture
def services(postgres_url: str, broker_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment that names the three services of this test alone."""
    return {
        "STOKER_POSTGRES__URL": postgres_url,
        "STOKER_BROKER__URL": broker_url,
        "STOKER_REDIS__URL": redis_url,
        "STOKER_HOME": str(tmp_path / "home"),
        "COLUMNS": "200",
    }


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    """An endpoint that takes 0.2 s for an answer, for any number at once."""
    with ScriptedEndpoint(latency_s=0.2) as server:
        yield server


@pytest.fixture
def env(services: dict[str, str], endpoint: ScriptedEndpoint) -> dict[str, str]:
    """Settings of a worker and of commands: 2 children with 8 jobs in flight each, leases of 3 s."""
    return services | {
        "STOKER_ENGINE__URL": endpoint.url,
        "STOKER_WORKER__IN_FLIGHT": "8",
        "STOKER_SHARD__MAX_JOBS": "16",
        "STOKER_WORKER__LEASE_S": "3",
        "STOKER_WORKER__HEARTBEAT_S": "1",
        "STOKER_WORKER__GRACE_S": "5",
    }


@pytest.fixture
def worker(env: dict[str, str], tmp_path: Path) -> Iterator[WorkerProcess]:
    """A worker that takes hints."""
    with WorkerProcess("one", env=env, folder=tmp_path) as running:
        yield running
