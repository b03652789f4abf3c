"""/v1/stoker/… over real Postgres and Redis: what the page reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from api.gateway import Gateway
from api.remembered import CHEAP_S, Remembered
from api.shortened import CHARACTERS, DEPTH, ITEMS, TEXT_CHARACTERS, VALUES, WHOLE_CHARACTERS, Shortener
from cache.policy import Limits, Policy
from models.endpoints import NANOS
from models.jobs import JobResult, failed
from models.names import batch_name
from models.states import Outcome, Scope
from store.budgets import open_batch_budget
from store.engine_days import EngineTime, add_engine_time
from store.engines import register_engine
from store.money import open_batch_money
from store.namespaces import NewNamespace, open_namespaces
from store.presence import WorkerPresence
from store.shards import write_results
from tests.api.conftest import ClientOf
from tests.support.batches import LEASE_S, answers, chat, claimed, dispatch_all, execute, store_batch

REJECTED = json.dumps({"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}})
NAMESPACE = NewNamespace(b"key", "", "m", "", "", "t", "", b"secret", Policy.begin(1, Limits(0.01, 0.05)).encode())


def run_batch(gateway: Gateway, folder: Path) -> UUID:
    """A batch of 6 lines: answered, rejected, timed out, equal to the second, and two that wait."""
    batch_id = store_batch(
        gateway.database,
        folder,
        [chat(f"question {number}", temperature=0) for number in (0, 1, 2, 1, 3, 4)],
        shard_jobs=3,
    )
    taken = claimed(gateway.database, dispatch_all(gateway.database)[0])
    assert sorted(taken.seqs) == [0, 1, 2]
    results = [
        *answers([0]),
        JobResult(seq=1, outcome=Outcome.FAILED, status_code=400, response=REJECTED),
        failed(2, code="timeout", message="no answer in 15 min"),
    ]
    with gateway.database.transaction() as session:
        assert write_results(session, taken, results, engine_id=None, lease_s=LEASE_S) == 3
    return batch_id


def get(client: TestClient, path: str, status: int = 200, **query: Any) -> Any:
    answer = client.get(f"/v1/stoker/{path}", params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_key_is_told_whose_it_is(client_of: ClientOf) -> None:
    found = get(client_of(tenant="acme", scopes=(Scope.SUBMIT, Scope.READ)), "me")
    assert (found["tenant"], found["name"], found["scopes"]) == ("acme", "test", ["read", "submit"])
    assert found["expires_at"] is None and found["key"] and found["version"]


def test_a_batch_shows_its_errors_by_kind_its_marks_and_its_course(
    client: TestClient, gateway: Gateway, tmp_path: Path
) -> None:
    batch_id = run_batch(gateway, tmp_path)
    execute(gateway.database, "INSERT INTO deliveries (tenant, batch_id, url, event) VALUES "
            "('local', :id, 'https://example.org/hook', 'batch.completed')", id=batch_id)  # fmt: skip
    execute(
        gateway.database,
        "INSERT INTO job_tries (batch_id, seq, tries, not_before, last_error) VALUES (:id, 4, 2, now(), 'HTTP 503')",
        id=batch_id,
    )
    with gateway.database.transaction() as session:
        open_batch_budget(session, batch_id, 1_000)
        open_batch_money(session, batch_id, 2_500_000_000)
    found = get(client, f"batches/{batch_name(batch_id)}")
    assert found["batch"]["id"] == batch_name(batch_id)
    assert found["errors"] == [
        {"code": "http_400", "count": 2, "message": "too long"},
        {"code": "timeout", "count": 1, "message": "no answer in 15 min"},
    ]
    assert found["errors_complete"]
    assert [mark["name"] for mark in found["marks"]] == ["created", "in_progress"]
    assert sum(bucket["jobs"] for bucket in found["finished"]) == 4
    assert sum(bucket["failed"] for bucket in found["finished"]) == 3
    assert found["waiting"] == {"jobs": 1, "tries": 2, "next_in_s": 0.0, "last_error": "HTTP 503"}
    [budget, money], [delivery] = found["budgets"], found["deliveries"]
    assert (budget["unit"], money["unit"], money["cap"], money["spent"]) == ("tokens", "USD", 2.5, 0)
    assert (budget["batch"], budget["period"], budget["cap"]) == (batch_name(batch_id), "batch", 1_000)
    assert (delivery["batch"], delivery["state"], delivery["tries"]) == (batch_name(batch_id), "pending", 0)
    assert get(client, "budgets")["data"] == [budget, money] and get(client, "deliveries")["data"] == [delivery]


def test_jobs_are_paged_by_line_and_by_outcome(client: TestClient, gateway: Gateway, tmp_path: Path) -> None:
    path = f"batches/{batch_name(run_batch(gateway, tmp_path))}/jobs"

    def lines(**query: Any) -> tuple[list[int], bool]:
        found = get(client, path, **query)
        assert found["has_more"] is (found["next_after"] is not None)
        return [job["line"] for job in found["data"]], found["has_more"]

    assert lines() == ([1, 2, 3, 4, 5, 6], False)
    assert lines(limit=2) == ([1, 2], True)
    assert lines(limit=2, after=4) == ([5, 6], False)
    assert lines(outcome="failed", limit=2) == ([2, 3], True)
    assert lines(outcome="failed", limit=2, after=3) == ([4], False)
    assert lines(outcome="waiting") == ([5, 6], False)
    assert lines(outcome="empty") == ([], False)
    rejected, follower = get(client, path, limit=1, after=1)["data"][0], get(client, path, after=3)["data"][0]
    assert (rejected["custom_id"], rejected["status_code"], rejected["source"]) == ("id-1", 400, "engine")
    assert (follower["outcome"], follower["source"]) == ("failed", "duplicate")
    for wrong in ({"limit": 0}, {"limit": 201}, {"after": -1}, {"outcome": "good"}, {"after": "x"}):
        assert get(client, path, 400, **wrong)["error"]["param"] == next(iter(wrong))


def test_one_job_shows_its_request_its_answer_and_why_it_failed(
    client: TestClient, gateway: Gateway, tmp_path: Path
) -> None:
    path = f"batches/{batch_name(run_batch(gateway, tmp_path))}/jobs"
    answered, rejected, late, follower, waiting = (get(client, f"{path}/{line}") for line in (1, 2, 3, 4, 5))
    assert answered["request"]["messages"][0]["content"] == "question 0"
    assert (answered["response"], answered["error"], answered["truncated"]) == ({"answer": 0}, None, False)
    assert rejected["error"] == {"code": "http_400", "message": "too long"}
    assert rejected["response"] == json.loads(REJECTED)
    assert late["error"] == {"code": "timeout", "message": "no answer in 15 min"} and late["response"] is None
    assert follower["stoker"] == {"leader": "id-1"}
    assert (waiting["outcome"], waiting["response"], waiting["error"]) == (None, None, None)
    for line, status in ((7, 404), (0, 400), ("x", 400), (2**31, 400)):
        get(client, f"{path}/{line}", status)


def test_nothing_of_another_tenant_is_shown(client_of: ClientOf, gateway: Gateway, tmp_path: Path) -> None:
    name = batch_name(run_batch(gateway, tmp_path))
    with gateway.database.transaction() as session:
        open_namespaces(session, "local", [NAMESPACE])
        open_batch_budget(session, UUID(name.removeprefix("batch_")), 5)
    other = client_of(tenant="other")
    for path in (f"batches/{name}", f"batches/{name}/jobs", f"batches/{name}/jobs/1"):
        found = get(other, path, 404)
        assert found["error"]["code"] == "not_found"
        assert found == get(client_of(), path.replace(name, batch_name(UUID(int=7))), 404) | {"error": found["error"]}
    for path in ("namespaces", "budgets", "deliveries"):
        assert get(other, path)["data"] == []
    get(client_of(scopes=(Scope.SUBMIT,)), "me", 403)


def test_workers_with_their_engines_readings_are_for_admins(client_of: ClientOf, gateway: Gateway) -> None:
    readings = {"running": 8, "waiting": 2, "tokens_per_s": 812.5, "kv_use": 0.25, "gpu_use": None}
    gateway.board.announce(WorkerPresence(name="a", children=2, models=["m"], engine="vllm", healthy=True, **readings))
    gateway.board.announce(
        WorkerPresence(name="b", node="documents", children=1, models=[], engine="reads documents", healthy=True)
    )
    get(client_of(), "workers", 403)
    first, second = get(client_of(scopes=(Scope.ADMIN,)), "workers")["data"]
    assert first == {"name": "a", "node": "generation", "engine": "vllm", "models": ["m"], "children": 2,
                     "healthy": True, **readings}  # fmt: skip
    assert (second["node"], second["tokens_per_s"], second["kv_use"]) == ("documents", None, None)


def test_namespaces_are_told_with_what_their_certificates_say(client: TestClient, gateway: Gateway) -> None:
    with gateway.database.transaction() as session:
        open_namespaces(session, "local", [NAMESPACE])
    found = get(client, "namespaces")
    [one] = found["data"]
    assert found["note"] is None
    assert (one["model"], one["template"], one["state"], one["lookups"]) == ("m", "t", "pilot", 0)
    assert one["error_limit"] == 0.01 and one["sentence"] and one["why"]


def deep(levels: int) -> Any:
    return 0 if not levels else [deep(levels - 1)]


@pytest.mark.parametrize(
    ("text", "shown", "is_cut"),
    [
        ('{"a": "\\ud800x", "b": [1, null, true]}', {"a": "?x", "b": [1, None, True]}, False),
        ("[NaN, 1e999, 12345678901234567890]", ["nan", "inf", "12345678901234567890"], False),
        ("{broken", "{broken", False),
        ("9" * 5_000, "9" * 5_000, False),
        ("[" * 100_000, "[" * TEXT_CHARACTERS + "… (80,000 more characters)", True),
        (json.dumps(["y" * WHOLE_CHARACTERS]), ["y" * TEXT_CHARACTERS + "… (180,000 more characters)"], True),
        ("[[]" + ",[]" * VALUES + "]", "[[]" + ",[]" * 6_665 + ",[… (1,480,004 more characters)", True),
        (json.dumps(list(range(60_000))), list(range(ITEMS)), True),
    ],
    ids=["surrogate", "numbers", "no JSON", "digits", "brackets", "text", "values", "list"],
)
def test_any_text_is_shown_and_cut_where_it_is_long(text: str, shown: Any, is_cut: bool) -> None:
    shortener = Shortener()
    assert shortener.read(text) == shown
    assert shortener.has_cut is is_cut


def test_what_is_shown_of_one_job_is_bounded(client: TestClient, gateway: Gateway, tmp_path: Path) -> None:
    batch_id = store_batch(gateway.database, tmp_path, [chat("question")])
    huge = json.dumps({"messages": [{"content": "z" * 100_000}] * 300, "deep": deep(500)})
    execute(gateway.database, "UPDATE jobs SET body = :body WHERE batch_id = :id", body=huge, id=batch_id)
    answer = client.get(f"/v1/stoker/batches/{batch_name(batch_id)}/jobs/1")
    assert answer.status_code == 200 and answer.json()["truncated"]
    assert len(answer.content) < CHARACTERS + 200 * ITEMS + 10 * DEPTH


def test_a_dear_answer_is_made_anew_no_oftener_than_it_may_cost() -> None:
    now, made = [100.0], []

    def make(cost_s: float) -> int:
        now[0] += cost_s
        made.append(cost_s)
        return len(made)

    remembered = Remembered[int](most=2, clock=lambda: now[0])
    assert [remembered.of("a", figures, lambda: make(CHEAP_S / 2)) for figures in (1, 1, 2)] == [1, 1, 2]
    assert remembered.of("a", 3, lambda: make(1.0)) == 3
    now[0] += 19
    assert remembered.of("a", 4, lambda: make(1.0)) == 3
    now[0] += 2
    assert remembered.of("a", 4, lambda: make(1.0)) == 4
    for other in ("b", "c"):
        remembered.of(other, 0, lambda: make(0.0))
    assert remembered.of("a", 4, lambda: make(0.0)) == 7, "the oldest of three is forgotten"


def test_costs_are_those_of_the_keys_tenant(client_of: ClientOf, gateway: Gateway, tmp_path: Path) -> None:
    reader, admin = client_of(scopes=(Scope.READ,)), client_of(scopes=(Scope.ADMIN,))
    batch_id = run_batch(gateway, tmp_path)
    with gateway.database.transaction() as session:
        cloud = register_engine(session, {"kind": "endpoint", "name": "cloud", "currency": "EUR"})
        own = register_engine(session, {"kind": "vllm"})
        for engine_id, cost in ((cloud, 1_500_000), (own, 0)):
            session.execute(
                text("""
                INSERT INTO usage (tenant, key_id, batch_id, engine_id, day, slot, jobs, prompt_tokens,
                    completion_tokens, cached_tokens, cost)
                VALUES ('local', '', :batch, :engine, CAST(now() AT TIME ZONE 'UTC' AS date), 0, 1, 3, 2, 0, :cost)"""),
                {"batch": batch_id, "engine": engine_id, "cost": cost},
            )
        add_engine_time(session, own, EngineTime(up_s=60), cost=NANOS, is_shared=False)
    found = get(reader, "costs", by="endpoint", batch_id=batch_name(batch_id))
    assert {line["name"]: (line["billed"], line["own"]) for line in found["lines"]} == {
        "cloud": (0.0015, 0.0),
        "vllm": (0.0, 1.0),
    }
    assert (found["engines"], len(get(admin, "costs")["engines"])) == ([], 1)
    assert get(reader, f"batches/{batch_name(batch_id)}")["batch"]["stoker"]["cost"] == {
        "amount": 0.0015,
        "currency": "EUR",
    }
    assert get(client_of(tenant="acme", scopes=(Scope.READ,)), "costs")["lines"] == []
    get(client_of(tenant="acme", scopes=(Scope.READ,)), "costs", 404, batch_id=batch_name(batch_id))
