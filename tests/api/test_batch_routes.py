"""/v1/batches in the gateway's own process: creation, states, what validation refuses, tenants, repetitions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from api.gateway import Gateway
from models.batch_requests import CreateBatch
from models.lines import ENDPOINTS
from pipeline.made_files import count_next
from pipeline.validate import validate_next
from runtime.settings import GatewaySettings
from store.batches import batches_to_finish, end_unfinished, finish, shards_to_wind_down
from store.database import Database
from store.presence import WorkerPresence
from store.shards import claim, close
from store.validating import claim_validating, refuse
from tests.api.conftest import ClientOf
from tests.support.batches import execute, rows

CHAT = "/v1/chat/completions"
Validate = Callable[[], int]


def line(custom_id: str = "a", *, url: str = CHAT, model: str = "m", **more: Any) -> str:
    body = {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": f"hello {custom_id}"}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def upload(client: TestClient, *lines: str) -> str:
    content = "".join(f"{one}\n" for one in lines).encode()
    answer = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def create(client: TestClient, file: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **fields}
    return client.post("/v1/batches", json=body, headers=headers)


def test_a_batch_is_answered_before_it_is_validated_and_then_runs(client: TestClient, validate: Validate) -> None:
    file = upload(client, line("a"), line("b"))
    made = create(client, file, metadata={"team": "search"})
    assert made.status_code == 200, made.text
    batch = made.json()
    assert (batch["object"], batch["status"], batch["input_file_id"]) == ("batch", "validating", file)
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["expires_at"] - batch["created_at"] == 86_400
    assert batch["metadata"] == {"team": "search"} and batch["output_file_id"] is None
    assert validate() == 1
    running = client.get(f"/v1/batches/{batch['id']}").json()
    assert (running["status"], running["request_counts"]["total"]) == ("in_progress", 2)
    assert running["expires_at"] == batch["expires_at"], "the window began with the creation"
    assert running["stoker"]["name"] == "in.jsonl"


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        (["{"], "invalid_json_line", 1),
        ([line("a"), line("a")], "duplicate_custom_id", 2),
        ([line("a"), json.dumps({"method": "POST", "url": CHAT, "body": {}})], "missing_custom_id", 2),
        ([line("a", url="/v1/embeddings")], "url_mismatch", 1),
        ([line("a", model="nobody-has-it")], "model_not_found", 1),
        ([], "empty_file", None),
        ([line("a"), line("b", method="GET")], "invalid_request", 2),
        ([line("a"), line("b"), line("c"), line("d")], "too_many_tasks", None),
        ([line("a" * 400), line("b" * 400)], "token_limit_exceeded", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
class TestRefused:
    @pytest.fixture
    def gateway_settings(self) -> GatewaySettings:
        return GatewaySettings(batch_lines=3, batch_tokens=250)

    def test_a_file_that_is_wrong_turns_its_batch_failed_and_names_the_line(
        self,
        client: TestClient,
        gateway: Gateway,
        validate: Validate,
        lines: list[str],
        code: str,
        number: int | None,
    ) -> None:
        gateway.board.announce(
            WorkerPresence(name="w", children=1, models=["m"], engine="e", healthy=True, in_flight=1)
        )
        batch = create(client, upload(client, *lines)).json()
        assert batch["status"] == "validating"
        validate()
        failed = client.get(f"/v1/batches/{batch['id']}").json()
        assert failed["status"] == "failed" and failed["failed_at"] is not None
        first = failed["errors"]["data"][0]
        assert (first["code"], first["line"]) == (code, number), first
        assert failed["output_file_id"] is None and failed["error_file_id"] is None
        assert rows(gateway.database, "SELECT count(*) FROM jobs UNION ALL SELECT count(*) FROM shards") == [(0,), (0,)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "tomorrow"}, "completion_window"),
        ({"completion_window": "9999d"}, "completion_window"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"colour": "red"}, "colour"),
        ({"stoker": {"colour": "red"}}, "stoker.colour"),
        ({"stoker": {"priority": "urgent"}}, "stoker.priority"),
        ({"stoker": {"trust": "everybody"}}, "stoker.trust"),
        ({"stoker": {"budget_money": 5}}, "stoker.budget_money"),
        ({"stoker": {"trust": "external", "budget_money": 0}}, "stoker.budget_money"),
        ({"stoker": {"trust": "external", "budget_money": "0.0000000001"}}, "stoker.budget_money"),
        ({"stoker": {"webhook": {"url": "http://127.0.0.1/x"}}}, "stoker.webhook.url"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_that_is_wrong_is_refused_by_field(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = create(client, "file-00", **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and error["message"]


def test_only_a_batch_file_that_is_there_makes_a_batch(client: TestClient) -> None:
    assert create(client, "file-00").status_code == 404
    other = client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "user_data"}).json()["id"]
    assert create(client, other).json()["error"]["param"] == "input_file_id"


def test_what_the_extras_say_holds_for_the_batch_and_its_lines(
    client: TestClient, gateway: Gateway, validate: Validate
) -> None:
    own = line("b", stoker={"collection": "mine", "top_k": 1})
    batch = create(
        client,
        upload(client, line("a"), own),
        stoker={
            "cache": "off",
            "collection": "ours",
            "top_k": 4,
            "priority": "high",
            "max_output_tokens": 3,
            "labels": {"team": "search"},
            "budget_tokens": 5000,
            "order": "file",
        },
    ).json()
    validate()
    extras = client.get(f"/v1/batches/{batch['id']}").json()["stoker"]
    assert (extras["cache"], extras["priority"], extras["labels"]) == ("off", "high", {"team": "search"})
    assert extras["budget_tokens"] == 5000 and extras["order"] == "file"
    assert rows(gateway.database, "SELECT cap FROM budgets") == [(5000,)]
    stored = [json.loads(stoker) for (stoker,) in rows(gateway.database, "SELECT stoker FROM jobs ORDER BY seq")]
    assert stored == [{"collection": "ours", "top_k": 4}, {"collection": "mine", "top_k": 1}]
    [body, _] = [json.loads(body) for (body,) in rows(gateway.database, "SELECT body FROM jobs ORDER BY seq")]
    assert body["max_tokens"] == 3


def test_prompts_stay_on_own_endpoints_unless_the_body_says_otherwise(
    client: TestClient, gateway: Gateway, validate: Validate
) -> None:
    file = upload(client, line())
    amounts: tuple[Any, ...] = (None, 5, "0.25", 0.000000001)
    made = [
        create(client, file, stoker={"trust": "external", "budget_money": amount} if amount else None).json()
        for amount in amounts
    ]
    validate()
    found = [client.get(f"/v1/batches/{one['id']}").json()["stoker"] for one in made]
    assert [one["trust"] for one in found] == ["own", "external", "external", "external"]
    assert [one["budget_money"] for one in found] == [None, 5.0, 0.25, 1e-9]
    assert [one["trust"] for one in (first["stoker"] for first in made)] == [one["trust"] for one in found]
    assert rows(gateway.database, "SELECT options ->> 'trust' FROM batches ORDER BY id")[:2] == [
        ("own",),
        ("external",),
    ]
    caps = rows(gateway.database, "SELECT cap FROM money_budgets ORDER BY batch_id")
    assert caps == [(5_000_000_000,), (250_000_000,), (1,)]


def test_a_creation_that_the_client_repeats_makes_one_batch(client: TestClient) -> None:
    file = upload(client, line())
    first = create(client, file).json()["id"]
    repeated = create(client, file, {"x-stainless-retry-count": "1"}).json()["id"]
    assert repeated == first
    assert create(client, file).json()["id"] != first, "another creation, not a repetition"
    other = create(client, file, {"x-stainless-retry-count": "2"}, metadata={"a": "b"}).json()["id"]
    assert other != first, "another request"


def test_an_idempotency_key_holds_for_one_request(client: TestClient, client_of: ClientOf) -> None:
    file, headers = upload(client, line()), {"Idempotency-Key": "order-66"}
    first = create(client, file, headers).json()["id"]
    assert create(client, file, headers).json()["id"] == first
    reused = create(client, file, headers, metadata={"a": "b"})
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "key_reused")
    colleague = client_of()
    assert create(colleague, file, headers).json()["id"] != first, "another key's"
    for asked, known in (("order-66", [first]), ("order-67", [])):
        found = client.get("/v1/batches", params={"idempotency_key": asked}).json()
        assert [one["id"] for one in found["data"]] == known


def test_models_are_those_that_every_live_worker_serves(client: TestClient, gateway: Gateway) -> None:
    assert client.get("/v1/models").json() == {"object": "list", "data": []}
    for name, models in (("one", ["small", "large"]), ("other", ["small"])):
        gateway.board.announce(WorkerPresence(name=name, children=1, models=models, engine="", healthy=True))
    served = client.get("/v1/models").json()["data"]
    known = {"object": "model", "created": 0, "owned_by": "stoker"}
    assert served == [{"id": "small", **known, "stoker": {"trust": "own"}}]


def test_models_of_external_endpoints_say_what_a_batch_must_allow(client: TestClient, gateway: Gateway) -> None:
    models: dict[str, Any] = {"models": ["small"], "external_models": ["small", "theirs"]}
    gateway.board.announce(WorkerPresence(name="one", children=1, engine="", healthy=True, **models))
    served = client.get("/v1/models").json()["data"]
    assert [(one["id"], one["stoker"]["trust"]) for one in served] == [("small", "own"), ("theirs", "external")]


def test_a_batch_may_be_cancelled_while_it_is_validated(
    client: TestClient, gateway: Gateway, validate: Validate
) -> None:
    batch = create(client, upload(client, line())).json()["id"]
    cancelling = client.post(f"/v1/batches/{batch}/cancel").json()
    assert cancelling["status"] == "cancelling" and cancelling["cancelling_at"]
    assert client.post(f"/v1/batches/{batch}/cancel").status_code == 200, "once more is harmless"
    validate()
    cancelled = client.get(f"/v1/batches/{batch}").json()
    assert cancelled["status"] == "cancelled" and cancelled["cancelled_at"]
    again = client.post(f"/v1/batches/{batch}/cancel")
    assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
    assert rows(gateway.database, "SELECT count(*) FROM jobs") == [(0,)]


def test_a_validator_that_died_is_replaced_and_one_that_wakes_changes_nothing(
    client: TestClient, gateway: Gateway, validate: Validate
) -> None:
    batch = create(client, upload(client, *(line(str(number)) for number in range(10)))).json()["id"]
    with gateway.database.transaction() as session:
        dead = claim_validating(session, lease=timedelta(minutes=5))
    assert dead is not None and validate() == 0, "it is held"
    execute(gateway.database, "INSERT INTO jobs SELECT id, 0, 'half', '{}', NULL FROM batches")
    execute(gateway.database, "UPDATE batches SET lease_until = now()")
    assert validate() == 1
    with gateway.database.transaction() as session:
        assert not refuse(session, dead, [])
    running = client.get(f"/v1/batches/{batch}").json()
    assert (running["status"], running["request_counts"]["total"]) == ("in_progress", 10)
    assert rows(gateway.database, "SELECT count(*), count(*) FILTER (WHERE custom_id = 'half') FROM jobs") == [(10, 0)]


def test_a_validator_that_is_to_end_puts_its_batch_back_and_that_is_no_try(
    client: TestClient, gateway: Gateway
) -> None:
    stop = threading.Event()
    stop.set()
    batch = create(client, upload(client, *(line(str(number)) for number in range(5000)))).json()["id"]
    assert validate_next(gateway.database, gateway.blobs, gateway.board, gateway.settings, stop=stop)
    assert rows(gateway.database, "SELECT state, validations, lease_until <= now() FROM batches") == [
        ("validating", 0, True)
    ]
    assert validate_next(gateway.database, gateway.blobs, gateway.board, gateway.settings)
    assert client.get(f"/v1/batches/{batch}").json()["request_counts"]["total"] == 5000


def test_uploads_that_are_out_of_reach_are_waited_for_and_bytes_that_are_gone_are_not_for_ever(
    client: TestClient, gateway: Gateway, validate: Validate, tmp_path: Path
) -> None:
    batch = create(client, upload(client, line())).json()["id"]
    folder = Path(gateway.blobs.url)
    folder.rename(tmp_path / "away")
    folder.touch()  # ENOTDIR, as a place that is broken
    for _ in range(8):
        assert validate() == 1
        execute(gateway.database, "UPDATE batches SET lease_until = now()")
    assert client.get(f"/v1/batches/{batch}").json()["status"] == "validating"
    folder.unlink()
    folder.mkdir()
    for _ in range(6):
        assert validate() == 1
        execute(gateway.database, "UPDATE batches SET lease_until = now()")
    failed = client.get(f"/v1/batches/{batch}").json()
    assert failed["status"] == "failed" and str(folder) not in json.dumps(failed)


def test_the_size_of_results_is_counted_apart_and_no_request_waits_for_it(
    client: TestClient, gateway: Gateway, validate: Validate
) -> None:
    batch = create(client, upload(client, line("a"), line("b"))).json()["id"]
    validate()
    client.post(f"/v1/batches/{batch}/cancel")
    end_cancelled_jobs(gateway.database)
    errors = client.get(f"/v1/batches/{batch}").json()["error_file_id"]
    before = client.get(f"/v1/files/{errors}").json()
    assert (before["bytes"], before["status"]) == (0, "uploaded")
    assert count_next(gateway.database) and not count_next(gateway.database)
    after = client.get(f"/v1/files/{errors}").json()
    content = client.get(f"/v1/files/{errors}/content").content
    assert (after["bytes"], after["status"], content.count(b"batch_cancelled")) == (len(content), "processed", 2)
    assert client.delete(f"/v1/files/{errors}").status_code == 200
    assert client.get(f"/v1/files/{errors}/content").status_code == 404


def end_cancelled_jobs(database: Database) -> None:
    """What the dispatch leader does for a cancelled batch."""
    with database.transaction() as session:
        for shard_id, _ in shards_to_wind_down(session, limit=10):
            taken = claim(session, shard_id, holder="test", lease_s=30.0, states=("pending", "dispatched"))
            assert taken is not None
            end_unfinished(session, shard_id=shard_id, fence=taken.fence, code="batch_cancelled", message="cancelled")
            close(session, taken)
    with database.transaction() as session:
        for batch_id in batches_to_finish(session):
            finish(session, batch_id)


def test_a_batch_that_is_validated_cannot_be_retried_yet(client: TestClient) -> None:
    batch = create(client, upload(client, line("a"))).json()["id"]
    answer = client.post(f"/v1/batches/{batch}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "wrong_state")
    assert "is validating and cannot be retried" in answer.json()["error"]["message"]


def test_a_retry_has_the_trust_of_its_batch_and_none_of_its_budgets(
    client: TestClient, gateway: Gateway, validate: Validate
) -> None:
    wishes = {"trust": "external", "budget_money": "0.25", "budget_tokens": 5000}
    batch = create(client, upload(client, line("a")), stoker=wishes).json()["id"]
    validate()
    client.post(f"/v1/batches/{batch}/cancel")
    end_cancelled_jobs(gateway.database)
    again = client.post(f"/v1/batches/{batch}/retry").json()["stoker"]
    assert (again["trust"], again["budget_money"], again["budget_tokens"]) == ("external", None, None)
    budgets = "SELECT count(*) FROM money_budgets UNION ALL SELECT count(*) FROM budgets"
    assert rows(gateway.database, budgets) == [(1,), (1,)]


def test_batches_are_listed_by_page(client: TestClient, client_of: ClientOf) -> None:
    file = upload(client, line())
    ids = [create(client, file).json()["id"] for _ in range(5)]
    page = client.get("/v1/batches", params={"limit": 2}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[4], ids[3]], True)
    assert (page["first_id"], page["last_id"]) == (ids[4], ids[3])
    rest = client.get("/v1/batches", params={"limit": 3, "after": ids[3]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([ids[2], ids[1], ids[0]], False)
    assert client.get("/v1/batches", params={"after": "batch_" + "0" * 32}).status_code == 404
    assert client_of(tenant="other").get("/v1/batches").json()["data"] == []


def test_a_batch_of_another_tenant_is_not_there(client: TestClient, client_of: ClientOf) -> None:
    file = upload(client, line())
    batch = create(client, file).json()["id"]
    other = client_of(tenant="other")
    assert create(other, file).status_code == 404
    for answer in (
        other.get(f"/v1/batches/{batch}"),
        other.post(f"/v1/batches/{batch}/cancel"),
        other.post(f"/v1/batches/{batch}/retry"),
        other.post(f"/v1/batches/{batch}/resume"),
        other.get("/v1/batches", params={"after": batch}),
        other.get(f"/v1/files/file-{batch.removeprefix('batch_')}-output/content"),
        other.get(f"/v1/files/file-{batch.removeprefix('batch_')}-errors"),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert client.get(f"/v1/batches/{batch}").json()["status"] == "validating"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stoker": {"a\0": 1}}, r"stoker.a\u0000"),
        ({"body": {"model": "m\0", "messages": [{"role": "user"}]}}, "body.model"),
        (
            {
                "body": {
                    **{"model": "m", "messages": [{"role": "user"}]},
                    "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "\0"}}},
                }
            },
            "body.response_format",
        ),
    ],
)
def test_what_postgres_cannot_store_of_a_line_is_told_and_ends_no_validator(
    client: TestClient, validate: Validate, more: dict[str, Any], param: str
) -> None:
    made = create(client, upload(client, line(**more)), stoker={"validate_answers": True}).json()
    assert validate() == 1
    found = client.get(f"/v1/batches/{made['id']}").json()
    assert (found["status"], found["errors"]["data"][0]["param"]) == ("failed", param)


def test_what_was_sent_is_not_sent_back_whole_with_an_error(client: TestClient) -> None:
    body = {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h", "x" * 100_000: 1}
    error = client.post("/v1/batches", json=body).json()["error"]
    assert error["param"] == "x" * 199 + "…"
    assert len(error["message"]) <= 2_000


def test_the_endpoints_of_a_creation_are_those_of_lines() -> None:
    assert get_args(CreateBatch.model_fields["endpoint"].annotation) == ENDPOINTS


def test_every_answer_has_the_headers_that_browsers_need(client: TestClient) -> None:
    answer = client.get("/v1/batches")
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    preflight = client.options(
        "/v1/batches", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in {**preflight.headers, **answer.headers}
