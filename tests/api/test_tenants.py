"""Nothing crosses tenants: every operation that the description names, asked by another tenant with foreign ids.

A new operation, parameter or body fails here until it is said what in it is an id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from starlette.testclient import TestClient

from api.gateway import Gateway
from models.names import batch_name
from models.states import Scope
from store.budgets import open_batch_budget
from store.namespaces import open_namespaces
from tests.api.conftest import ClientOf
from tests.api.test_inspection_routes import NAMESPACE, run_batch
from tests.support.batches import execute, rows

# Idempotency keys are a key's own: tests/api/test_batch_routes.py. `after` of jobs is a line.
NO_ID = {"purpose", "limit", "order", "outcome", "by", "days", "after_line", "line", "after", "x-stainless-retry-count"}
NO_ID |= {"idempotency-key", "idempotency_key"}
BODIES_WITHOUT_ID = {"/v1/files", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"}
NOBODYS = UUID(int=7).hex
PROMPT, HOOK = "question 0", "https://example.org/theirs"


@dataclass(frozen=True)
class Request:
    """One request of an operation."""

    method: str
    path: str
    query: dict[str, str]
    body: Any = None

    def of(self, client: TestClient) -> Any:
        """Its answer to a client."""
        return client.request(self.method, self.path, params=self.query, json=self.body)

    def names(self, identifier: str) -> bool:
        """Whether this id stands in it."""
        return identifier in self._said()

    def naming(self, other: str, *, instead_of: str) -> Request:
        """The same with another id."""
        return Request(self.method, *json.loads(self._said().replace(instead_of, other)))

    def _said(self) -> str:
        return json.dumps([self.path, self.query, self.body])


@dataclass(frozen=True)
class World:
    """What the tenant `local` has."""

    batch: str
    upload: str

    def values_of(self, path: str, name: str) -> list[str | None]:
        """The ids that a parameter may have; None: it is left out."""
        made = f"file-{self.batch.removeprefix('batch_')}"
        known: dict[str, list[str | None]] = {
            "batch_id": [self.batch],
            "file_id": [self.upload, f"{made}-output", f"{made}-errors"],
        }
        if (path, name) == ("/v1/files", "after"):
            return [self.upload, None]
        if (path, name) == ("/v1/batches", "after"):
            return [self.batch, None]
        if name in known:
            return [*known[name]] if f"{{{name}}}" in path else [*known[name], None]
        assert name in NO_ID, f"{path}: say in this test whether {name} is an id"
        return ["1"] if name == "line" else [None]

    def requests(self, description: dict[str, Any]) -> Iterator[Request]:
        """Every operation with every id that it takes."""
        for path, operations in description["paths"].items():
            for method, operation in operations.items():
                parameters = operation.get("parameters", [])
                names = [one["name"] for one in parameters]
                for values in product(*(self.values_of(path, name) for name in names)):
                    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
                    query = {name: value for name, value in given.items() if f"{{{name}}}" not in path}
                    yield Request(method.upper(), path.format(**given), query, self._body(path, operation))

    def _body(self, path: str, operation: dict[str, Any]) -> Any:
        if "requestBody" not in operation or path in BODIES_WITHOUT_ID:
            return None
        assert path == "/v1/batches", f"{path}: say in this test what in its body is an id"
        return {"input_file_id": self.upload, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


@pytest.fixture
def world(client_of: ClientOf, gateway: Gateway, tmp_path: Path) -> World:
    """A tenant with something of every kind."""
    batch_id = run_batch(gateway, tmp_path)
    upload = client_of().post("/v1/files", files={"file": ("in.jsonl", b"{}\n")}, data={"purpose": "batch"})
    with gateway.database.transaction() as session:
        open_namespaces(session, "local", [NAMESPACE])
        open_batch_budget(session, batch_id, 5)
    execute(
        gateway.database,
        "INSERT INTO deliveries (tenant, batch_id, url, event) VALUES ('local', :id, :hook, 'batch.completed')",
        id=batch_id,
        hook=HOOK,
    )
    return World(batch_name(batch_id), upload.json()["id"])


def test_another_tenants_ids_are_answered_as_ids_of_nothing(
    world: World, client_of: ClientOf, gateway: Gateway
) -> None:
    mine, theirs = client_of(scopes=tuple(Scope)), client_of(tenant="other", scopes=tuple(Scope))
    asked = list(world.requests(theirs.get("/openapi.json").json()))
    hexes = (world.batch.removeprefix("batch_"), world.upload.removeprefix("file-"))
    before = everything(gateway)
    named = 0
    for request in asked:
        answer = request.of(theirs)
        own = next((one for one in hexes if request.names(one)), None)
        if own is None:
            assert not any(secret in answer.text for secret in (*hexes, PROMPT, HOOK)), request
            continue
        named += 1
        nothing = request.naming(NOBODYS, instead_of=own).of(theirs)
        assert (answer.status_code, answer.text.replace(own, NOBODYS)) == (404, nothing.text), request
        assert answer.headers.keys() == nothing.headers.keys(), request
    assert named >= 20
    assert everything(gateway) == before, "and nothing of it was changed"
    for request in (one for one in asked if one.method == "GET"):
        assert request.of(mine).status_code in (200, 409), f"whose it is may: {request}"


def everything(gateway: Gateway) -> list[Any]:
    """The rows that requests could change."""
    found = [rows(gateway.database, "SELECT * FROM batches"), rows(gateway.database, "SELECT * FROM jobs")]
    return [*found, rows(gateway.database, "SELECT * FROM files"), rows(gateway.database, "SELECT * FROM results")]
