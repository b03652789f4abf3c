"""Who may ask what: a small application with real keys in Postgres and real limits in Redis."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import text
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api.auth import Admin, KeyedRoute, Principal, Reader, Submitter
from api.errors import ApiError
from api.gateway import Gateway
from api.uploads import UploadSlots
from models.keys import MadeKey, remake_key
from models.states import Scope
from pipeline.keys import issue_key
from runtime.settings import GatewaySettings, Settings
from store.blobs import Blobs
from store.database import Database
from store.keys import revoke_key, rotate_key, set_key_expiry, set_key_rate
from store.presence import PresenceBoard
from store.rate_limits import WRONG_KEYS_PER_MINUTE, RateLimits

JSON = {"content-type": "application/json"}


class Wish(BaseModel):
    """A body with one field."""

    count: int


def whoami(principal: Principal) -> dict[str, Any]:
    """What the routes answer."""
    return {"key": principal.key_id, "tenant": principal.tenant, "name": principal.name}


def routes(router: APIRouter) -> APIRouter:
    """A route for each scope."""

    @router.get("/read")
    def read(principal: Reader) -> dict[str, Any]:
        return whoami(principal)

    @router.post("/submit")
    def submit(principal: Submitter, wish: Wish) -> dict[str, Any]:
        return whoami(principal) | {"count": wish.count}

    @router.get("/admin")
    def admin(principal: Admin) -> dict[str, Any]:
        return whoami(principal)

    @router.get("/open")
    def opened() -> dict[str, str]:
        return {}

    return router


@pytest.fixture
def app(database: Database, redis_url: str, tmp_path: Path) -> Iterator[FastAPI]:
    """The application; under /plain are the same routes, made without KeyedRoute."""
    made = FastAPI()
    made.include_router(routes(APIRouter(route_class=KeyedRoute)))
    made.include_router(routes(APIRouter(prefix="/plain")))

    @made.exception_handler(ApiError)
    def answer(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.answer.model_dump(), error.status_code, headers=error.headers)

    limits, board = RateLimits(redis_url), PresenceBoard(redis_url)
    settings = Settings.model_construct(gateway=GatewaySettings(requests_per_minute=600))
    made.state.gateway = Gateway(
        settings=settings,
        database=database,
        blobs=Blobs(str(tmp_path)),
        limits=limits,
        board=board,
        upload_slots=UploadSlots(settings.gateway),
    )
    yield made
    limits.close()
    board.close()


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client of it, without a key."""
    with TestClient(app) as opened:
        yield opened


def issued(database: Database, *scopes: Scope, tenant: str = "acme", name: str = "ci") -> MadeKey:
    """A new key."""
    with database.transaction() as session:
        return issue_key(session, tenant=tenant, name=name, scopes=scopes or (Scope.READ,)).key


def bearer(key: MadeKey | str) -> dict[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {key if isinstance(key, str) else key.text}"}


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        pytest.param(Scope.READ, {"/read"}, id="read"),
        pytest.param(Scope.SUBMIT, {"/submit"}, id="submit"),
        pytest.param(Scope.ADMIN, {"/read", "/submit", "/admin"}, id="admin"),
    ],
)
def test_a_key_may_do_what_its_scopes_say(
    client: TestClient, database: Database, scope: Scope, allowed: set[str]
) -> None:
    key = issued(database, scope)
    for prefix, (path, body) in product(("", "/plain"), (("/read", None), ("/submit", {"count": 1}), ("/admin", None))):
        answer = client.request("POST" if body else "GET", prefix + path, headers=bearer(key), json=body)
        if path in allowed:
            assert answer.status_code == 200 and answer.json()["key"] == key.id
            continue
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (403, "permission_error")
        assert f"lacks the scope {path[1:]};" in error["message"]


def test_every_key_that_opens_nothing_is_answered_alike(client: TestClient, database: Database) -> None:
    revoked, expired, right = issued(database), issued(database), issued(database)
    with database.transaction() as session:
        revoke_key(session, revoked.id)
        set_key_expiry(session, expired.id, timedelta(seconds=-1))
    shown = [
        {},
        {"Authorization": right.text},
        {"Authorization": f"Basic {right.text}"},
        bearer(""),
        bearer(right.text + "A"),
        bearer(remake_key(right.id)),
        bearer(f"sk-{'0' * 12}{right.text[15:]}"),
        bearer(revoked),
        bearer(expired),
    ]
    answers = [client.get("/read", headers=headers) for headers in shown]
    answers.append(client.get("/read", headers={b"Authorization": "Bearer sk-é".encode()}))
    assert {(answer.status_code, answer.text) for answer in answers} == {(401, answers[0].text)}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert answers[0].json()["error"]["type"] == "authentication_error"
    assert client.get("/read", headers={"Authorization": f"bearer {right.text}"}).status_code == 200
    assert client.get("/open").status_code == 200


def test_a_body_is_not_looked_at_before_the_key(client: TestClient, database: Database) -> None:
    reader, submitter = issued(database), issued(database, Scope.SUBMIT)
    for body in (b"{", b'{"count": "none"}', b""):
        answers = [
            client.post("/submit", content=body, headers=JSON | headers)
            for headers in ({}, bearer(reader), bearer(submitter))
        ]
        assert [answer.status_code for answer in answers] == [401, 403, 422], body


def test_a_body_is_not_read_before_the_key(client: TestClient, database: Database) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield bytes(1024)

    assert client.post("/submit", content=endless(), headers=JSON).status_code == 401
    assert sent == 0
    headers = JSON | bearer(issued(database, Scope.SUBMIT))
    assert client.post("/submit", content=endless(), headers=headers).status_code == 422
    assert sent == 100


def test_a_rotated_key_opens_with_both_secrets_while_its_grace_lasts(client: TestClient, database: Database) -> None:
    before = issued(database)
    after = remake_key(before.id)
    with database.transaction() as session:
        rotate_key(session, before.id, digest=after.digest, grace=timedelta(hours=1))
    assert [client.get("/read", headers=bearer(key)).status_code for key in (before, after)] == [200, 200]
    with database.transaction() as session:
        session.execute(text("UPDATE api_keys SET previous_until = clock_timestamp()"))
    assert [client.get("/read", headers=bearer(key)).status_code for key in (before, after)] == [401, 200]


def test_a_key_is_its_tenants_and_its_use_is_noted(client: TestClient, database: Database) -> None:
    for tenant in ("acme", "globex"):
        key = issued(database, tenant=tenant, name=f"of {tenant}")
        said = client.get("/read", headers=bearer(key)).json()
        assert said == {"key": key.id, "tenant": tenant, "name": f"of {tenant}"}
    with database.transaction() as session:
        assert session.scalar(text("SELECT bool_and(last_used_at IS NOT NULL) FROM api_keys"))


def test_a_key_that_asks_too_often_is_told_how_long_to_wait(client: TestClient, database: Database) -> None:
    busy, quiet = issued(database), issued(database)
    with database.transaction() as session:
        set_key_rate(session, busy.id, 1)
    answers = [client.get("/read", headers=bearer(busy)) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "1"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == [
        str(left) for left in (*range(9, -1, -1), 0)
    ]
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    assert 30 < int(answers[-1].headers["retry-after"]) <= 60
    assert client.get("/read", headers=bearer(quiet)).headers["x-ratelimit-limit-requests"] == "600"


def test_an_address_that_guesses_is_no_longer_heard_and_a_right_key_beside_it_is(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    known, unknown = issued(database), issued(database)
    assert client.get("/read", headers=bearer(known)).status_code == 200
    guesses = [client.get("/read", headers=bearer(remake_key(known.id))) for _ in range(WRONG_KEYS_PER_MINUTE + 5)]
    assert {answer.status_code for answer in guesses[:WRONG_KEYS_PER_MINUTE]} == {401}
    assert guesses[-1].status_code == 429 and int(guesses[-1].headers["retry-after"]) >= 1
    assert client.get("/read", headers=bearer(unknown)).status_code == 429  # whether it is right is not said
    assert client.get("/read", headers=bearer(known)).status_code == 200
    with TestClient(app, client=("192.0.2.7", 1)) as elsewhere:
        assert elsewhere.get("/read", headers=bearer(unknown)).status_code == 200


def test_no_secret_is_logged_or_stored(
    client: TestClient, database: Database, postgres_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    key, wrong = issued(database), remake_key("0" * 12)
    with capture_logs() as logs:
        for shown in (key, wrong):
            client.get("/read", headers=bearer(shown))
            client.get("/admin", headers=bearer(shown))
    assert {log["event"] for log in logs} == {"authentication_failed"} and logs[0]["key"] == wrong.id
    dump = subprocess.run(
        ["pg_dump", "--inserts", "--dbname", postgres_url], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert key.id in dump
    for secret in (key.text[16:], wrong.text[16:]):
        for place in (dump, json.dumps(logs, default=str), *capfd.readouterr(), repr(key)):
            assert secret not in place and secret.encode().hex() not in place


def test_the_description_names_the_scheme_of_every_route_that_needs_a_key(app: FastAPI) -> None:
    described = app.openapi()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    secured = {path: "security" in next(iter(described["paths"][path].values())) for path in described["paths"]}
    assert {path for path, is_secured in secured.items() if not is_secured} == {"/open", "/plain/open"}
