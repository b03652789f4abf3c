"""An endpoint that serves others too: its key, its limits, our account there; and results that say what they cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
import uvloop
from aiohttp import web

from inference.embeddings import pack
from inference.endpoint import Endpoint, QuotaExhausted, Refused, Reply, Throttled
from inference.replies import result_of
from models.jobs import Job
from runtime.errors import StokerError
from tests.support.scripted_endpoint import ScriptedEndpoint

T = TypeVar("T")
CHAT = "/v1/chat/completions"
COST = 51_150  # nanos
KEY = "sk-a-long-secret"
Started = Callable[..., ScriptedEndpoint]


@pytest.fixture(scope="module")
def start() -> Iterator[Started]:
    with ExitStack() as running:
        yield lambda **options: running.enter_context(ScriptedEndpoint(**options))


@pytest.fixture(scope="module")
def server(start: Started) -> ScriptedEndpoint:
    return start(api_key=KEY, auth_header="api-key", models=["theirs", "other"])


def chat(prompt: str, *, model: str = "ours") -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()


def ask(url: str, *prompts: str, model: str | None = "theirs", **options: Any) -> list[Reply | StokerError]:
    opened = {"api_key": KEY, "timeout_s": 10, "connections": 4, "auth": "api-key", "is_shared": True, **options}

    async def run() -> list[Reply | StokerError]:
        async with Endpoint(url, **opened) as endpoint:
            posts = [endpoint.post(CHAT, chat(prompt), request_id="r", model=model) for prompt in prompts]
            answers = await asyncio.gather(*posts, return_exceptions=True)
        unexpected = [answer for answer in answers if not isinstance(answer, Reply | StokerError)]
        assert not unexpected
        return [answer for answer in answers if isinstance(answer, Reply | StokerError)]

    return uvloop.run(run())


def test_the_key_goes_into_the_header_that_it_is_for_and_the_model_is_theirs(server: ScriptedEndpoint) -> None:
    (reply,) = ask(server.url, "hi")

    assert isinstance(reply, Reply)
    assert json.loads(reply.body)["model"] == "theirs"
    assert json.loads(reply.body)["choices"][0]["message"]["content"] == "echo: hi"


def test_a_refused_key_is_the_endpoints_matter_where_it_is_shared_and_else_the_jobs(server: ScriptedEndpoint) -> None:
    (refused,) = ask(server.url, "hi", auth="bearer")
    (reply,) = ask(server.url, "hi", auth="bearer", is_shared=False)

    assert isinstance(refused, Refused)
    assert "look at its api key" in str(refused)
    assert KEY not in str(refused)
    assert isinstance(reply, Reply)
    assert reply.status_code == 401


def test_a_spent_account_is_told_from_too_many_requests(server: ScriptedEndpoint) -> None:
    spent, throttled = ask(server.url, "[[quota]]", "[[status 429 retry-after 3 x-ratelimit-remaining-requests 0]]")

    assert isinstance(spent, QuotaExhausted)
    assert isinstance(throttled, Throttled)
    assert throttled.retry_after_s == 3
    assert throttled.seen is not None
    assert throttled.seen.remaining_requests == 0


def test_what_it_says_of_its_limits_comes_with_answers_and_with_refusals(start: Started) -> None:
    limited = start(requests_per_minute=60, tokens_per_minute=6000)

    replies = ask(limited.url, *(f"prompt {n}" for n in range(3)))

    answered = [reply for reply in replies if isinstance(reply, Reply)]
    refused = [reply for reply in replies if isinstance(reply, Throttled)]
    assert (len(answered), len(refused)) == (1, 2)
    for said in (answered[0].seen, refused[0].seen):
        assert said is not None
        assert (said.limit_requests, said.limit_tokens, said.remaining_requests) == (60, 6000, 0)
    assert all(error.retry_after_s is not None and 0.5 < error.retry_after_s <= 1 for error in refused)
    assert limited.calls().statuses == {"200": 1, "429": 2}
    assert ask(limited.url, "no one reads them", is_shared=False)


def test_a_share_of_requests_fails_by_chance(start: Started) -> None:
    failing = start(fail_share=0.5, seed=3)

    ask(failing.url, *(f"prompt {n}" for n in range(40)))
    first = failing.calls().statuses
    failing.set(fail_share=0.0)
    ask(failing.url, *(f"prompt {n}" for n in range(40)))

    assert 10 < first["500"] < 30
    assert failing.calls().statuses == {"200": first["200"] + 40, "500": first["500"]}
    assert failing.calls().repeats == first["200"]


@pytest.mark.parametrize(
    ("base", "asked"),
    [
        ("", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/openai/v1/", "/openai/v1/chat/completions"),
        ("/api/v1", "/api/v1/chat/completions"),
        ("/inference", "/inference/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
        ("/v1/openai", "/v1/openai/chat/completions"),
        ("/api/paas/v4", "/api/paas/v4/chat/completions"),
        ("/vip", "/vip/v1/chat/completions"),
    ],
)
def test_a_base_url_with_a_path_is_taken_as_its_provider_writes_it(base: str, asked: str) -> None:
    _, paths = with_statuses({}, lambda endpoint: endpoint.post(CHAT, b"{}", request_id="r"), base=base)

    assert paths == [asked]


@pytest.mark.parametrize(
    ("statuses", "is_shared", "is_healthy"),
    [
        ({"/health": 200}, True, True),
        ({"/health": 503}, True, False),
        ({"/health": 401, "/v1/models": 200}, True, True),
        ({"/health": 404, "/v1/models": 401}, True, False),
        ({"/health": 404, "/v1/models": 404}, True, True),
        ({"/health": 404, "/v1/models": 404}, False, False),
    ],
)
def test_a_shared_endpoint_is_healthy_that_answers(
    statuses: dict[str, int], *, is_shared: bool, is_healthy: bool
) -> None:
    assert with_statuses(statuses, Endpoint.is_healthy, is_shared=is_shared)[0] is is_healthy


def with_statuses(
    statuses: dict[str, int], work: Callable[[Endpoint], Awaitable[T]], *, base: str = "", is_shared: bool = False
) -> tuple[T, list[str]]:
    """What `work` returns with a server of these statuses by path (else 200), and the paths that it was asked for."""
    paths: list[str] = []

    async def handle(request: web.BaseRequest) -> web.Response:
        paths.append(request.path)
        return web.Response(status=statuses.get(request.path, 200))

    async def run() -> T:
        server = await asyncio.get_running_loop().create_server(web.Server(handle), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{base}"
        async with server, Endpoint(url, api_key=None, timeout_s=5, connections=1, is_shared=is_shared) as endpoint:
            return await work(endpoint)

    return uvloop.run(run()), paths


def reply_with(usage: dict[str, int], *, status: int = 200, **more: Any) -> Reply:
    answer = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": usage, **more}
    return Reply(status, json.dumps(answer).encode(), 5, engine_id=7, cost=COST if status == 200 else 0)


def test_a_result_says_who_gave_it_and_what_it_cost() -> None:
    answered = result_of(1, CHAT, reply_with({"prompt_tokens": 1000, "completion_tokens": 100}))
    refused = result_of(1, CHAT, reply_with({}, status=400))
    useless = result_of(1, CHAT, Reply(200, b"<html>", 5, engine_id=7, cost=COST))
    own = result_of(1, CHAT, Reply(200, b"{}", 5))

    assert (answered.engine_id, answered.cost) == (7, COST)
    assert (refused.engine_id, refused.cost) == (7, 0)
    assert (useless.engine_id, useless.cost) == (7, COST)
    assert (own.engine_id, own.cost) == (None, None)


def test_the_cost_of_embeddings_asked_together_is_divided_and_sums_up() -> None:
    bodies = [json.dumps({"model": "e", "input": "word " * n}) for n in (1, 40, 300)]
    jobs = [Job(seq=seq, body=body, tries=0) for seq, body in enumerate(bodies)]
    (packed,) = pack(jobs, max_tokens=8192, max_inputs=8)
    data = [{"index": index, "embedding": [0.5]} for index in range(3)]

    results = packed.split(reply_with({"prompt_tokens": 341}, data=data))

    costs = [result.cost or 0 for result in results]
    assert sum(costs) == COST
    assert costs == sorted(costs)
    assert {result.engine_id for result in results} == {7}
