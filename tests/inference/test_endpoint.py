"""The endpoint against a real server that does what the prompt says."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from email.utils import format_datetime
from typing import Any, TypeVar

import pytest
import uvloop

from inference.endpoint import Endpoint, EndpointDown, Reply
from runtime.clock import utc_now
from runtime.errors import BadInput, Permanent, Transient
from tests.support.scripted_endpoint import ScriptedEndpoint

T = TypeVar("T")
Work = Callable[[Endpoint], Coroutine[Any, Any, T]]
KEY = "sk-a-long-secret"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint(api_key=KEY) as running:
        yield running


def with_endpoint(
    url: str, work: Work[T], *, key: str | None = KEY, timeout_s: float = 10.0, connections: int = 8
) -> T:
    async def run() -> T:
        async with Endpoint(url, api_key=key, timeout_s=timeout_s, connections=connections) as endpoint:
            return await work(endpoint)

    return uvloop.run(run())


def chat(prompt: str) -> bytes:
    return json.dumps({"model": "scripted", "messages": [{"role": "user", "content": prompt}]}).encode()


def ask(url: str, prompt: str, *, key: str | None = KEY, timeout_s: float = 10.0) -> Reply:
    return with_endpoint(
        url, lambda endpoint: endpoint.post(CHAT, chat(prompt), request_id="r"), key=key, timeout_s=timeout_s
    )


def content_of(reply: Reply) -> str:
    content: str = json.loads(reply.body)["choices"][0]["message"]["content"]
    return content


async def until_running(server: ScriptedEndpoint, count: int, *, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while (await asyncio.to_thread(server.calls)).running != count:
        assert time.monotonic() < end, f"the server never had {count} requests in it"
        await asyncio.sleep(0.01)


def test_an_answer_comes_back_as_bytes_with_its_duration(server: ScriptedEndpoint) -> None:
    reply = ask(server.url, "hello [[latency 0.05]]")

    assert reply.status_code == 200
    assert content_of(reply) == "echo: hello [[latency 0.05]]"
    assert 50 <= reply.duration_ms < 5000


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_with_v1_or_not(server: ScriptedEndpoint, suffix: str) -> None:
    assert ask(server.url.removesuffix("/v1") + suffix, "hi").status_code == 200


def test_a_unix_socket_serves_the_same(server: ScriptedEndpoint) -> None:
    assert content_of(ask(server.unix_url, "by socket")) == "echo: by socket"


@pytest.mark.parametrize("status", [302, 400, 403, 404, 413, 422, 501])
def test_a_rejection_is_a_reply(server: ScriptedEndpoint, status: int) -> None:
    reply = ask(server.url, f"[[status {status} location /elsewhere]]")

    assert reply.status_code == status
    assert json.loads(reply.body)["error"]["message"] == "as the script says"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_status_that_may_pass_is_transient(server: ScriptedEndpoint, status: int) -> None:
    with pytest.raises(Transient, match=f"answered {status}: .*as the script says") as caught:
        ask(server.url, f"[[status {status}]]")

    assert not isinstance(caught.value, EndpointDown)
    assert caught.value.retry_after_s is None


@pytest.mark.parametrize(
    ("header", "wish_s"),
    [
        ("retry-after 2", 2.0),
        ("retry-after 0.5", 0.5),
        ("retry-after -3", 0.0),
        ("retry-after-ms 250 retry-after 9", 0.25),
        ("retry-after soon", None),
        ("retry-after nan", None),
        ("retry-after inf", None),
        ("retry-after Wed,_21_Oct_2015_07:28:00_GMT", 0.0),
        ("retry-after Wed,_21_Oct_99999_07:28:00_GMT", None),
    ],
)
def test_the_servers_wish_to_wait_is_passed_on(server: ScriptedEndpoint, header: str, wish_s: float | None) -> None:
    with pytest.raises(Transient) as caught:
        ask(server.url, f"[[status 429 {header}]]")

    assert caught.value.retry_after_s == wish_s


def test_a_date_to_come_is_a_wish_in_seconds(server: ScriptedEndpoint) -> None:
    date = format_datetime(utc_now() + timedelta(seconds=60), usegmt=True).replace(" ", "_")

    with pytest.raises(Transient) as caught:
        ask(server.url, f"[[status 503 retry-after {date}]]")

    assert caught.value.retry_after_s is not None
    assert 50 < caught.value.retry_after_s <= 60


@pytest.mark.parametrize("order", ["[[drop connection]]", "[[drop mid-body]]"])
def test_a_broken_connection_means_the_server_is_down(server: ScriptedEndpoint, order: str) -> None:
    with pytest.raises(EndpointDown):
        ask(server.url, order)


def test_a_refused_connection_means_the_server_is_down() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(EndpointDown, match=r"127\.0\.0\.1"):
            ask(url, "hello")
    with pytest.raises(EndpointDown):
        ask("unix:///nowhere/at/all.sock", "hello")


def test_a_killed_server_breaks_what_was_in_flight_and_serves_again_after_its_start() -> None:
    async def work(endpoint: Endpoint) -> Reply:
        requests = [asyncio.create_task(endpoint.post(CHAT, chat(f"[[hang]] {n}"), request_id="r")) for n in range(4)]
        await until_running(own, 4)
        own.kill()
        errors = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(error) for error in errors] == [EndpointDown] * 4
        assert not await endpoint.is_healthy()
        own.start()
        assert await endpoint.is_healthy()
        return await endpoint.post(CHAT, chat("again"), request_id="r")

    with ScriptedEndpoint() as own:
        assert content_of(with_endpoint(own.url, work)) == "echo: again"


def test_a_silent_server_ends_the_job_with_a_timeout(server: ScriptedEndpoint) -> None:
    with pytest.raises(Permanent, match=r"within 0\.2 s") as caught:
        ask(server.url, "[[hang]]", timeout_s=0.2)

    assert caught.value.code == "timeout"


def test_waiting_for_a_connection_does_not_count_as_the_servers_time(server: ScriptedEndpoint) -> None:
    async def work(endpoint: Endpoint) -> list[Reply]:
        posts = (endpoint.post(CHAT, chat("[[latency 0.4]]"), request_id="r") for _ in range(4))
        return await asyncio.gather(*posts)

    replies = with_endpoint(server.url, work, timeout_s=1.0, connections=1)

    assert [reply.status_code for reply in replies] == [200] * 4


def test_a_probe_does_not_wait_behind_the_jobs(server: ScriptedEndpoint) -> None:
    async def work(endpoint: Endpoint) -> bool:
        post = asyncio.create_task(endpoint.post(CHAT, chat("[[hang]] probe"), request_id="r"))
        await until_running(server, 1)
        healthy = await endpoint.is_healthy()
        post.cancel()
        await asyncio.gather(post, return_exceptions=True)
        return healthy

    assert with_endpoint(server.url, work, connections=1)


def test_a_cancelled_job_leaves_the_server(server: ScriptedEndpoint) -> None:
    async def work(endpoint: Endpoint) -> None:
        post = asyncio.create_task(endpoint.post(CHAT, chat("[[hang]] cancelled"), request_id="r"))
        await until_running(server, 1)
        post.cancel()
        await asyncio.gather(post, return_exceptions=True)
        await until_running(server, 0)

    with_endpoint(server.url, work)


def test_a_body_of_many_megabytes_goes_out_in_pieces(server: ScriptedEndpoint) -> None:
    prompt = "x" * (3 * 1024 * 1024)

    assert content_of(ask(server.url, prompt)) == f"echo: {prompt}"


def test_a_body_said_to_be_huge_is_refused_before_it_is_read(server: ScriptedEndpoint) -> None:
    with pytest.raises(Permanent, match="more than 256 MB") as caught:
        ask(server.url, "[[huge]]")

    assert caught.value.code == "response_too_large"


def test_the_key_is_sent_and_never_shown(server: ScriptedEndpoint) -> None:
    refused = ask(server.url, "hello", key="sk-another-secret")

    assert refused.status_code == 401
    assert b"another" not in refused.body
    assert b"Bearer ***" in refused.body


def test_health_is_what_the_server_says(server: ScriptedEndpoint) -> None:
    async def work(endpoint: Endpoint) -> list[bool]:
        first = await endpoint.is_healthy()
        await asyncio.to_thread(server.set_health, False)
        second = await endpoint.is_healthy()
        await asyncio.to_thread(server.set_health, True)
        return [first, second, await endpoint.is_healthy()]

    assert with_endpoint(server.url, work) == [True, False, True]


def test_a_server_without_health_is_judged_by_its_models(server: ScriptedEndpoint) -> None:
    with ScriptedEndpoint(without_health=True) as bare:
        assert with_endpoint(bare.url, Endpoint.is_healthy)


def test_the_server_names_its_models_and_version(server: ScriptedEndpoint) -> None:
    assert with_endpoint(server.url, Endpoint.served_models) == ["scripted"]
    assert with_endpoint(server.url, Endpoint.version) == "scripted-1"


def test_a_server_that_is_not_there_has_no_models() -> None:
    with pytest.raises(EndpointDown):
        with_endpoint("http://127.0.0.1:9", Endpoint.served_models)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host/v1", "http://", "http://host:0", "http://host:many", "http://[::1",
     "http://me:hush@host", "http://a..b/v1", "http://a b/v1", "http://a\x01b/v1", "http://host/v1?key=hush",
     "http://host/v1/chat/completions", "http://host/v1/models/", "unix://relative.sock", "unix://"],
)  # fmt: skip
def test_a_url_of_another_form_is_refused_with_the_remedy_and_without_its_secret(url: str) -> None:
    with pytest.raises(BadInput, match="write http://host:port/v1") as caught:
        Endpoint(url, api_key=None, timeout_s=1, connections=1)

    assert "hush" not in str(caught.value)


def test_a_host_of_other_letters_is_asked_for_by_its_ascii_name() -> None:
    with pytest.raises(EndpointDown, match="münchen"):
        with_endpoint("http://münchen.invalid/v1", Endpoint.served_models)


def test_an_endpoint_outside_its_block_is_a_defect() -> None:
    endpoint = Endpoint("http://127.0.0.1:9", api_key=None, timeout_s=1, connections=1)

    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(endpoint.is_healthy())
