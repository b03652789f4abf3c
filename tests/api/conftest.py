"""A gateway in this process, over real Postgres, Redis and files, and clients with keys of two tenants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.gateway import Gateway
from api.server import open_gateway
from models.keys import make_key
from models.states import Scope
from pipeline.validate import validate_next
from runtime.settings import GatewaySettings, PostgresSettings, RedisSettings, Settings
from store.keys import NewKey, create_key

ClientOf = Callable[..., TestClient]


@pytest.fixture
def gateway_settings() -> GatewaySettings:
    """What the gateway's own settings are; a test may have others."""
    return GatewaySettings()


@pytest.fixture
def gateway(postgres_url: str, redis_url: str, tmp_path: Path, gateway_settings: GatewaySettings) -> Iterator[Gateway]:
    """The parts of a gateway of this test alone."""
    settings = Settings(
        home=tmp_path / "home",
        postgres=PostgresSettings(url=postgres_url),
        redis=RedisSettings(url=redis_url),
        gateway=gateway_settings,
    )
    with ExitStack() as stack:
        yield open_gateway(settings, stack)


@pytest.fixture
def client_of(gateway: Gateway) -> Iterator[ClientOf]:
    """A client with a new key: `client_of(tenant="other", scopes=[Scope.READ])`."""
    with ExitStack() as stack:
        app = create_app(gateway)

        def made(tenant: str = "local", scopes: tuple[Scope, ...] = (Scope.SUBMIT, Scope.READ)) -> TestClient:
            key = make_key()
            with gateway.database.transaction() as session:
                create_key(session, NewKey(id=key.id, tenant=tenant, name="test", digest=key.digest, scopes=scopes))
            headers = {"Authorization": f"Bearer {key.text}"}
            return stack.enter_context(TestClient(app, headers=headers, raise_server_exceptions=False))

        yield made


@pytest.fixture
def client(client_of: ClientOf) -> TestClient:
    """A client of the tenant `local`, which may submit and read."""
    return client_of()


@pytest.fixture
def validate(gateway: Gateway) -> Callable[[], int]:
    """Do what the validators have to do now: how many batches they took."""

    def all_of_them() -> int:
        count = 0
        while validate_next(gateway.database, gateway.blobs, gateway.board, gateway.settings):
            count += 1
        return count

    return all_of_them
