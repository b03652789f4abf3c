"""Which endpoint gets a request, and what becomes of it where that one cannot: real servers, no worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop

from inference.endpoint import Endpoint, EndpointDown, Reply
from inference.router import Router
from inference.routes import Route
from inference.terms import Terms
from models.endpoints import EndpointSpec, Prices
from models.states import Trust
from runtime.errors import Permanent, Stopped, Transient
from tests.support.scripted_endpoint import ScriptedEndpoint

CHAT = "/v1/chat/completions"
EXTERNAL = Terms(trust=Trust.EXTERNAL)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[ScriptedEndpoint, ScriptedEndpoint]]:
    with ScriptedEndpoint(slots=4) as first, ScriptedEndpoint() as second:
        yield first, second


@pytest.fixture
def first(servers: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> Iterator[ScriptedEndpoint]:
    yield servers[0]
    servers[0].forget()


@pytest.fixture
def second(servers: tuple[ScriptedEndpoint, ScriptedEndpoint]) -> Iterator[ScriptedEndpoint]:
    yield servers[1]
    servers[1].forget()


def body(text: str = "hello", model: str = "scripted") -> bytes:
    asked = {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": text}]}
    return json.dumps(asked, separators=(",", ":")).encode()


def said(reply: Reply) -> str:
    answer: str = json.loads(reply.body)["choices"][0]["message"]["content"]
    return answer


def spec(name: str, url: str, **stated: Any) -> EndpointSpec:
    return EndpointSpec(**{"name": name, "url": url, "models": {"scripted": "scripted"}, "trust": "own", **stated})


@dataclass(slots=True)
class Wallet:
    """Pays as long as it has something left."""

    left: int = 10**9
    told: list[tuple[int, int]] = field(default_factory=list)
    spilled: list[bool] = field(default_factory=list)

    async def pay(self, prices: Prices, path: str, body: bytes, *, spills: bool) -> int:
        nanos = prices.most_nanos(prompt_tokens=len(body), output_tokens=16)
        self.spilled.append(spills)
        return nanos if nanos <= self.left else 0

    def ended(self, reserved: int, *, spent: int) -> None:
        self.told.append((reserved, spent))


@asynccontextmanager
async def routed(*specs: EndpointSpec, engine: str | None = None, places: int = 8) -> AsyncIterator[Router]:
    async with AsyncExitStack() as opened:

        async def connected(url: str, *, is_shared: bool, streams: bool = False) -> Endpoint:
            endpoint = Endpoint(
                url, api_key=None, timeout_s=10.0, connections=64, is_shared=is_shared, streams=streams,
                first_byte_s=5.0, idle_s=5.0,
            )  # fmt: skip
            return await opened.enter_async_context(endpoint)

        own = None if engine is None else Route(await connected(engine, is_shared=False), places=places)
        router = Router(engine=own)
        router.set_routes(
            [
                Route.of(
                    one,
                    await connected(one.url, is_shared=True, streams=one.trust is Trust.EXTERNAL),
                    engine_id=number,
                )
                for number, one in enumerate(specs, 1)
            ]
        )
        await router.learn_models()
        yield router


def run(work: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(work())  # type: ignore[arg-type]


async def sent(router: Router, texts: list[str], terms: Terms = EXTERNAL) -> list[Reply]:
    posts = [router.post(CHAT, body(text), request_id=f"r-{n}", terms=terms) for n, text in enumerate(texts)]
    return await asyncio.gather(*posts)


def shares(replies: list[Reply]) -> dict[int | None, int]:
    found = [reply.engine_id for reply in replies]
    return {one: found.count(one) for one in set(found)}


def test_the_faster_endpoint_gets_more(first: ScriptedEndpoint, second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("a", first.url), spec("b", second.url)) as router:
            first.script("[[latency 0.2]]", match="n")
            second.script("[[latency 0.02]]", match="n")
            got = shares(await sent(router, [f"n {n}" for n in range(100)]))
            assert got[2] > 2 * got[1] > 0

    run(work)


def test_prompts_that_begin_alike_keep_to_one_own_endpoint(first: ScriptedEndpoint, second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("a", first.url), spec("b", second.url)) as router:
            kept = set()
            for group in range(12):
                replies = [
                    await router.post(CHAT, body(f"{group} " * 600 + str(n)), request_id="r", terms=EXTERNAL)
                    for n in range(4)
                ]
                assert len(shares(replies)) == 1
                kept |= set(shares(replies))
            assert kept == {1, 2}

    run(work)


def test_an_endpoint_that_has_had_too_many_rests_and_another_answers(
    first: ScriptedEndpoint, second: ScriptedEndpoint
) -> None:
    async def work() -> None:
        async with routed(spec("a", first.url), spec("b", second.url)) as router:
            first.script("[[status 429 retry-after 30]]", match="busy")
            replies = await sent(router, [f"busy {n}" for n in range(20)])
            assert shares(replies) == {2: 20}

    before = first.calls().count
    run(work)
    assert first.calls().count - before <= 8  # its first window; nothing while it rests


def test_a_request_goes_on_where_no_connection_is_made(second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("gone", "http://127.0.0.1:9/v1"), spec("b", second.url)) as router:
            assert shares(await sent(router, [str(n) for n in range(10)])) == {2: 10}
        async with routed(spec("gone", "http://127.0.0.1:9/v1")) as router:
            with pytest.raises(EndpointDown) as found:
                await router.post(CHAT, body(), request_id="r")
            assert not found.value.was_sent

    run(work)


def test_a_server_error_is_answered_by_another(first: ScriptedEndpoint, second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("a", first.url), spec("b", second.url)) as router:
            first.script("[[status 500]]", match="bad")
            assert shares(await sent(router, [f"bad {n}" for n in range(12)])) == {2: 12}
            second.script("[[status 502]]", match="bad")
            with pytest.raises(Transient):
                await router.post(CHAT, body("bad"), request_id="r")

    run(work)


def test_an_engine_that_breaks_under_a_request_is_no_failover(
    first: ScriptedEndpoint, second: ScriptedEndpoint
) -> None:
    async def work() -> None:
        async with routed(spec("b", second.url), engine=first.url) as router:
            alone = Terms(alone=True)
            with pytest.raises(EndpointDown) as found:
                await router.post(CHAT, body("[[drop connection]]"), request_id="r", terms=alone)
            assert found.value.was_sent
            engine = router.engine_for(CHAT)
            assert engine is not None and engine.is_down
            assert shares(await sent(router, ["after"])) in ({1: 1}, {None: 1})

    run(work)


def test_what_may_leave_only_leaves_when_it_may(second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("far", second.url, trust="external")) as router:
            with pytest.raises(Permanent, match="--trust external") as found:
                await router.post(CHAT, body(), request_id="r")
            assert found.value.code == "trust_refused"
            assert said((await sent(router, ["hello"]))[0]) == "echo: hello"
            with pytest.raises(Permanent, match="no endpoint serves other"):
                await router.post(CHAT, body(model="other"), request_id="r", terms=EXTERNAL)

    run(work)


def test_the_cheapest_that_is_ready_is_paid_and_its_bill_is_of_its_tokens(
    first: ScriptedEndpoint, second: ScriptedEndpoint
) -> None:
    async def work() -> None:
        dear = spec("dear", first.url, trust="external", prices={"input": "100", "output": "100"})
        cheap = spec("cheap", second.url, trust="external", prices={"input": "1", "output": "2"})
        wallet = Wallet()
        async with routed(dear, cheap) as router:
            terms = Terms(trust=Trust.EXTERNAL, payer=wallet)
            [reply] = await sent(router, ["one two"], terms)
            assert reply.engine_id == 2
            usage = json.loads(reply.body)["usage"]
            cost = 1000 * usage["prompt_tokens"] + 2000 * usage["completion_tokens"]
            assert wallet.told == [(wallet.told[0][0], cost)] and reply.cost == cost < wallet.told[0][0]
            assert wallet.spilled == [False]
            with pytest.raises(Permanent, match="--budget-money"):
                await sent(router, ["unpaid"])

    run(work)


def test_an_own_engine_is_full_before_anything_is_paid(first: ScriptedEndpoint, second: ScriptedEndpoint) -> None:
    async def work() -> None:
        wallet = Wallet()
        cheap = spec("cheap", second.url, trust="external", prices={"input": "1"})
        async with routed(cheap, engine=first.url, places=4) as router:
            first.script("[[latency 0.3]]", match="full")
            replies = await sent(router, [f"full {n}" for n in range(6)], Terms(trust=Trust.EXTERNAL, payer=wallet))
            assert shares(replies) == {None: 4, 1: 2}
            assert wallet.spilled == [True, True]
            wallet.left = 0
            replies = await sent(router, [f"full {n}" for n in range(6)], Terms(trust=Trust.EXTERNAL, payer=wallet))
            assert shares(replies) == {None: 6}

    run(work)


def test_a_priced_answer_that_is_lost_is_paid_in_full_and_not_asked_for_elsewhere(
    first: ScriptedEndpoint, second: ScriptedEndpoint
) -> None:
    async def work() -> None:
        wallet = Wallet()
        priced = {"trust": "external", "prices": {"input": "1"}}
        async with routed(spec("a", second.url, **priced), spec("b", first.url, **priced)) as router:
            second.script("[[drop connection]]", match="lost")
            first.script("[[drop connection]]", match="lost")
            with pytest.raises(Transient, match="may have been done"):
                await sent(router, ["lost"], Terms(trust=Trust.EXTERNAL, payer=wallet))
            assert len(wallet.told) == 1 and wallet.told[0][0] == wallet.told[0][1] > 0

    run(work)


def test_a_spent_quota_closes_an_endpoint_and_names_it(first: ScriptedEndpoint, second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("a", first.url), spec("b", second.url)) as router:
            first.script("[[quota]]", match="quota")
            assert shares(await sent(router, [f"quota {n}" for n in range(8)])) == {2: 8}
            closed = next(route for route in router.routes if route.name == "a")
            assert "quota" in closed.closed_for

    run(work)


def test_a_request_that_waits_stops_with_its_attempt(first: ScriptedEndpoint) -> None:
    async def work() -> None:
        stopped = False
        async with routed(spec("a", first.url, concurrency=1)) as router:
            first.script("[[latency 1]]", match="slow")
            terms = Terms(stopped=lambda: stopped)
            running = asyncio.create_task(router.post(CHAT, body("slow"), request_id="r", terms=terms))
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(router.post(CHAT, body("slow 2"), request_id="r", terms=terms))
            await asyncio.sleep(0.05)
            stopped = True
            with pytest.raises(Stopped):
                await waiting
            assert said(await running) == "echo: slow"

    run(work)


def test_an_endpoint_is_asked_for_the_model_by_its_own_name(second: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("b", second.url, models={"small": "scripted"})) as router:
            reply = await router.post(CHAT, body(model="small"), request_id="r")
            assert json.loads(reply.body)["model"] == "scripted"
            assert router.registered("small") is not None
            assert router.registered("scripted") is None

    run(work)


def test_without_money_own_endpoints_do_what_they_can(first: ScriptedEndpoint, second: ScriptedEndpoint) -> None:
    async def work() -> None:
        cheap = spec("cheap", second.url, trust="external", prices={"input": "1"})
        async with routed(cheap, engine=first.url, places=2) as router:
            assert router.places(Trust.EXTERNAL) == 2 < router.places(Trust.EXTERNAL, pays=True)
            assert shares(await sent(router, [f"unpaid {n}" for n in range(6)])) == {None: 6}

    run(work)


def test_what_a_proxy_gave_up_is_paid_and_not_done_twice_at_once(
    first: ScriptedEndpoint, second: ScriptedEndpoint
) -> None:
    async def work() -> None:
        wallet = Wallet()
        priced = {"trust": "external", "prices": {"input": "1"}}
        async with routed(spec("a", second.url, **priced), spec("b", first.url, **priced)) as router:
            with pytest.raises(Transient, match="may have been done"):
                await sent(router, ["[[status 504]]"], Terms(trust=Trust.EXTERNAL, payer=wallet))
            assert [spent for _, spent in wallet.told] == [wallet.told[0][0]]
            with pytest.raises(Transient):
                await sent(router, ["[[status 503]]"], Terms(trust=Trust.EXTERNAL, payer=wallet))
            assert [spent for _, spent in wallet.told[1:]] == [0, 0]

    run(work)


def test_a_request_that_is_always_too_much_does_not_hold_up_the_others(first: ScriptedEndpoint) -> None:
    async def work() -> None:
        async with routed(spec("a", first.url)) as router:
            first.script("[[status 429 retry-after 0]]", match="too large")
            large = asyncio.create_task(router.post(CHAT, body("too large"), request_id="r", terms=EXTERNAL))
            assert shares(await sent(router, [f"small {n}" for n in range(40)])) == {1: 40}
            with pytest.raises(Transient):
                await large

    run(work)


def test_a_budget_that_is_too_small_for_one_endpoint_is_used_at_a_cheaper_one(
    first: ScriptedEndpoint, second: ScriptedEndpoint
) -> None:
    class Tight(Wallet):
        async def pay(self, prices: Prices, path: str, body: bytes, *, spills: bool) -> int:
            if prices.input > 1:
                raise Permanent("may cost too much", code="budget_exceeded")
            return await super().pay(prices, path, body, spills=spills)

    async def work() -> None:
        dear = spec("dear", first.url, trust="external", prices={"input": "100"})
        cheap = spec("cheap", second.url, trust="external", prices={"input": "1"}, concurrency=1)
        second.script("[[latency 0.1]]", match="tight")
        terms = Terms(trust=Trust.EXTERNAL, payer=Tight())
        async with routed(dear, cheap) as router:
            assert shares(await sent(router, [f"tight {n}" for n in range(4)], terms)) == {2: 4}
        async with routed(dear) as router:
            with pytest.raises(Permanent, match="dear: may cost too much"):
                await sent(router, ["tight"], terms)

    run(work)
