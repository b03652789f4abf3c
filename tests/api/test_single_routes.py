"""Single requests over HTTP: a real gateway, Redis and the express node's loop over a scripted endpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import text
from starlette.testclient import TestClient

from api.gateway import Gateway
from models.endpoints import EndpointSpec, Prices
from models.states import Scope
from runtime.settings import GatewaySettings
from store.budgets import set_key_caps
from store.engines import register_engine
from store.money import set_key_money
from tests.api.conftest import ClientOf
from tests.support.express_node import ExpressNode
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


@pytest.fixture
def slots() -> int:
    """Of the node's engine."""
    return 8


@pytest.fixture
def node(endpoint: ScriptedEndpoint, redis_url: str, slots: int) -> Iterator[ExpressNode]:
    with ExpressNode(endpoint.url, redis_url, slots=slots) as running:
        yield running


@pytest.fixture
def gateway_settings() -> GatewaySettings:
    return GatewaySettings(express_s=1.5, express_requests=4)


@pytest.fixture
def gateway(gateway: Gateway, node: ExpressNode) -> Gateway:
    """The gateway, whose hints the node gets."""
    with gateway.database.transaction() as session:
        node.engine_id = register_engine(session, {"kind": "scripted"})
    node.database = gateway.database
    return dataclasses.replace(gateway, invite=node.invite)


def chat(words: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": words}], **more}


def refused(client: TestClient, body: Any, *, path: str = CHAT) -> tuple[int, str, str | None]:
    answer = client.post(path, json=body) if not isinstance(body, bytes) else client.post(path, content=body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_each_kind_of_request_is_answered_as_the_engine_answers(client: TestClient) -> None:
    answer = client.post(CHAT, json=chat())
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "echo: hello"
    assert "x-ratelimit-remaining-requests" in answer.headers
    completion = client.post("/v1/completions", json={"model": "scripted", "prompt": "hello"})
    assert completion.json()["choices"][0]["text"]
    vectors = client.post("/v1/embeddings", json={"model": "scripted", "input": ["a", "b"]})
    assert len(vectors.json()["data"]) == 2


def test_an_answer_may_come_as_a_stream_of_one_event(client: TestClient) -> None:
    asked = chat(stream=True, stream_options={"include_usage": True})
    answer = client.post(CHAT, json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    whole, usage = (json.loads(event.removeprefix("data: ")) for event in events)
    assert whole["object"] == "chat.completion.chunk"
    delta = whole["choices"][0]["delta"]
    assert (delta["role"], delta["content"]) == ("assistant", "echo: hello")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)


def test_what_is_wrong_with_a_request_is_said_before_it_costs_anything(
    client: TestClient, client_of: ClientOf, endpoint: ScriptedEndpoint
) -> None:
    before = endpoint.calls().count
    assert refused(client, b"{") == (400, "invalid_json", None)
    assert refused(client, b"[]") == (400, "invalid_json", None)
    assert refused(client, {"model": "scripted"}) == (400, "invalid_value", "messages")
    assert refused(client, chat(temperature=3)) == (400, "invalid_value", "temperature")
    assert refused(client, chat(stream="yes")) == (400, "invalid_value", "stream")
    assert refused(client, chat(stoker={"trust": "all"})) == (400, "invalid_value", "stoker")
    assert refused(client, chat(stoker={"cache": "off"})) == (400, "invalid_value", "stoker")
    assert refused(client, chat() | {"model": "other"}) == (404, "model_not_found", "model")
    assert refused(client_of(scopes=(Scope.READ,)), chat()) == (403, "missing_scope", None)
    assert endpoint.calls().count == before


def test_what_the_engine_refuses_is_told_in_its_words(client: TestClient) -> None:
    answer = client.post(CHAT, json=chat("[[status 422]]"))
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert refused(client, chat("[[status 501]]")) == (400, "invalid_value", "model")
    away = client.post(CHAT, json=chat("[[status 500]]"))
    assert (away.status_code, away.json()["error"]["code"]) == (503, "unavailable")
    assert away.headers["Retry-After"] == "2"
    died = client.post(CHAT, json=chat("[[drop connection]]"))
    assert (died.status_code, died.json()["error"]["code"]) == (503, "engine_died")
    assert died.headers["x-should-retry"] == "false"


def test_a_request_is_not_held_for_ever_and_its_work_ends_with_it(
    client: TestClient, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    assert refused(client, chat("[[hang]]")) == (504, "timeout", None)
    with redis.Redis.from_url(redis_url) as store:
        assert not list(store.scan_iter("stoker:express:*"))
    wait_until(lambda: endpoint.calls().running == 0, 5, "the engine has nothing more to do")


def test_no_more_are_open_than_may_be(client: TestClient) -> None:
    with ThreadPoolExecutor(5) as pool:
        statuses = list(pool.map(lambda n: client.post(CHAT, json=chat(f"[[latency 0.7]] {n}")).status_code, range(5)))
    assert sorted(statuses) == [200, 200, 200, 200, 429]


def test_redis_may_be_emptied_while_they_wait(client: TestClient, endpoint: ScriptedEndpoint, redis_url: str) -> None:
    before = endpoint.calls().count

    def empty() -> None:
        wait_until(lambda: endpoint.calls().count > before, 5, "it is under way")
        with redis.Redis.from_url(redis_url) as store:
            for key in store.scan_iter("stoker:express:*"):
                store.delete(key)

    with ThreadPoolExecutor(1) as pool:
        emptied = pool.submit(empty)
        assert client.post(CHAT, json=chat("[[later answer second]] [[latency 0.3]]")).status_code == 200
        emptied.result()


def test_a_budget_is_charged_before_and_gets_back_what_was_not_taken(
    client: TestClient, gateway: Gateway, endpoint: ScriptedEndpoint
) -> None:
    key_id = client.headers["authorization"].split("-")[1].split("_")[0]
    with gateway.database.transaction() as session:
        [key_id] = session.scalars(text("SELECT id FROM api_keys")).all()
        set_key_caps(session, key_id, day_tokens=2000, month_tokens=None)
    assert client.post(CHAT, json=chat(max_tokens=16)).status_code == 200
    with gateway.database.transaction() as session:
        spent = session.execute(text("SELECT spent, reserved FROM budgets")).all()
        usage = session.execute(text("SELECT jobs, prompt_tokens + completion_tokens, key_id FROM usage")).all()
    assert spent == [(3, 0)]
    assert usage == [(1, 3, key_id)]

    before = endpoint.calls().count
    status, code, _ = refused(client, chat(n=100, max_tokens=1000))
    assert (status, code) == (429, "insufficient_quota")
    assert endpoint.calls().count == before
    assert refused(client, chat("[[status 400]]", max_tokens=16))[0] == 400
    with gateway.database.transaction() as session:
        assert session.scalars(text("SELECT spent FROM budgets")).all() == [3]


def test_a_priced_endpoint_is_asked_for_who_allows_it_and_has_money(
    client: TestClient, gateway: Gateway, node: ExpressNode, endpoint: ScriptedEndpoint
) -> None:
    spec = EndpointSpec(
        name="cloud", url=endpoint.url, models={"dear": "scripted"}, prices=Prices(input=Decimal(2), output=Decimal(8))
    )
    with gateway.database.transaction() as session:
        [key_id] = session.scalars(text("SELECT id FROM api_keys")).all()
        engine_id = register_engine(session, {"kind": "endpoint"})
    node.sell(spec, engine_id)
    asked = chat(max_tokens=16, stoker={"trust": "external"}) | {"model": "dear"}
    before = endpoint.calls().count
    assert refused(client, asked | {"stoker": {"trust": "own"}}) == (404, "model_not_found", "model")
    unpaid = client.post(CHAT, json=asked)
    assert (unpaid.status_code, unpaid.json()["error"]["code"]) == (429, "insufficient_quota")
    assert f"`stoker keys limit {key_id} --money-per-day N`" in unpaid.json()["error"]["message"]
    for nanos, code in ((1_000, 429), (10**9, 200)):
        with gateway.database.transaction() as session:
            set_key_money(session, key_id, day_money=nanos, month_money=None)
        answer = client.post(CHAT, json=asked)
        assert answer.status_code == code, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "echo: hello"
    assert endpoint.calls().count == before + 1
    cost = 1 * 2_000 + 2 * 8_000  # a word in, two words out
    wait_until(lambda: money_of(gateway) == [(cost, 0)], 5, "it is settled, after it was answered")
    with gateway.database.transaction() as session:
        assert session.execute(text("SELECT engine_id, cost FROM usage")).all() == [(engine_id, cost)]
    useless = asked | {"messages": [{"role": "user", "content": "[[not json]]"}]}
    assert client.post(CHAT, json=useless).status_code == 502
    wait_until(lambda: money_of(gateway)[0][0] > cost, 5, "what was billed is spent though it was of no use")
    with gateway.database.transaction() as session:
        known = session.scalars(text("SELECT cost FROM usage")).one()
    assert money_of(gateway) == [(known, 0)]


@pytest.mark.parametrize("slots", [1])
def test_what_own_endpoints_have_no_place_for_is_bought(
    client: TestClient, gateway: Gateway, node: ExpressNode, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.purse.OWN_FIRST_S", 0.0)
    spec = EndpointSpec(
        name="cloud", url=endpoint.url, models={"scripted": "scripted"}, prices=Prices(output=Decimal(8))
    )
    with gateway.database.transaction() as session:
        [key_id] = session.scalars(text("SELECT id FROM api_keys")).all()
        set_key_money(session, key_id, day_money=10**9, month_money=None)
        engine_id = register_engine(session, {"kind": "endpoint"})
    node.sell(spec, engine_id)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(client.post, CHAT, json=chat("[[hang]]"))
        wait_until(lambda: endpoint.calls().running == 1, 5, "the engine is full")
        answer = client.post(CHAT, json=chat(max_tokens=16, stoker={"trust": "external"}))
        assert answer.status_code == 200 and not hanging.done()
    wait_until(lambda: money_of(gateway) == [(2 * 8_000, 0)], 5, "two words were bought")


def money_of(gateway: Gateway) -> list[tuple[int, int]]:
    """(spent, reserved) of each budget of money."""
    with gateway.database.transaction() as session:
        found = session.execute(text("SELECT spent, reserved FROM money_budgets"))
        return [(spent, reserved) for spent, reserved in found]


def test_without_an_express_node_it_says_how_to_get_one(client: TestClient, redis_url: str, tmp_path: Path) -> None:
    with redis.Redis.from_url(redis_url) as store:
        store.delete("stoker:worker:express")
    answer = client.post(CHAT, json=chat())
    assert answer.status_code == 503
    assert "STOKER_WORKER__EXPRESS_SLOTS" in answer.json()["error"]["message"]
