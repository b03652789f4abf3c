"""Limits that several workers share, in a real Redis and without one."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from models.endpoints import EndpointSpec, Grant, RatesSeen
from store import endpoint_limits
from store.endpoint_limits import KEY_PREFIX, PLACE_WAIT_S, EndpointLimits
from tests.support.conversing import empty_redis
from tests.support.waiting import wait_until

NOWHERE = "redis://:secret@127.0.0.1:1/0"


def endpoint(name: str = "far", **limits: Any) -> EndpointSpec:
    """An endpoint with these limits."""
    return EndpointSpec(name=name, url="http://127.0.0.1:1/v1", models={"m": "m"}, **limits)


def run(url: str, use: Callable[..., Awaitable[None]], *, workers: int = 1) -> None:
    """Call `use` with the limits as so many workers have them."""

    async def connected() -> None:
        async with AsyncExitStack() as stack:
            await use(*[await stack.enter_async_context(aclosing(_Closing(url))) for _ in range(workers)])

    asyncio.run(connected())


class _Closing(EndpointLimits):
    async def aclose(self) -> None:
        await self.close()


async def granted_in(limits: EndpointLimits, spec: EndpointSpec, seconds: float, *, tokens: int = 1) -> int:
    """How many requests go within a time, from one that asks again as soon as it is told to."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        grant = await limits.take(spec, tokens=tokens)
        if grant.wait_s:
            await asyncio.sleep(min(grant.wait_s, end - time.monotonic() + 0.001))
        else:
            count += 1
    return count


def test_workers_together_get_the_requests_a_minute_and_half_a_second_of_them_at_once(redis_url: str) -> None:
    spec = endpoint(requests_per_minute=6000)  # 100 a second

    async def use(*workers: EndpointLimits) -> None:
        began = time.monotonic()
        counts = await asyncio.gather(*[granted_in(worker, spec, 0.6) for worker in workers])
        most = 50 + 100 * (time.monotonic() - began)
        assert 55 <= sum(counts) <= most + 1

    run(redis_url, use, workers=4)


def test_tokens_are_counted_as_they_were_used(redis_url: str) -> None:
    spec = endpoint(tokens_per_minute=600)  # 10 a second, 5 at once

    async def use(limits: EndpointLimits) -> None:
        first = await limits.take(spec, tokens=5)
        assert first.wait_s == 0
        await limits.settle(spec, first, tokens=1)  # 4 come back
        second = await limits.take(spec, tokens=4)
        assert second.wait_s == 0
        await limits.settle(spec, second, tokens=304)  # half a minute's worth more than it was thought to
        assert 25 < (await limits.take(spec, tokens=1)).wait_s <= 30.1

    run(redis_url, use)


def test_tokens_are_as_many_as_were_thought_where_nothing_else_is_known(redis_url: str) -> None:
    spec = endpoint(tokens_per_minute=6)

    async def use(limits: EndpointLimits) -> None:
        for used in (None, 3):
            grant = await limits.take(spec, tokens=1)
            await limits.settle(spec, grant, tokens=used)
            assert (9 if used is None else 29) < (await limits.take(spec, tokens=1)).wait_s <= 40
            empty_redis(redis_url)

    run(redis_url, use)


def test_a_wish_for_more_tokens_than_the_bucket_holds_goes_when_it_is_full(redis_url: str) -> None:
    spec = endpoint(tokens_per_minute=600)

    async def use(limits: EndpointLimits) -> None:
        assert (await limits.take(spec, tokens=305)).wait_s == 0
        assert 25 < (await limits.take(spec, tokens=1)).wait_s <= 30.1
        assert 25.4 < (await limits.take(spec, tokens=10_000)).wait_s <= 30.5

    run(redis_url, use)


def test_nothing_is_taken_where_one_of_the_limits_says_no(redis_url: str) -> None:
    spec = endpoint(requests_per_minute=6, tokens_per_minute=600, concurrency=1)

    async def use(limits: EndpointLimits) -> None:
        assert (await limits.take(spec, tokens=500)).wait_s == 0
        for _ in range(50):
            assert 40 < (await limits.take(spec, tokens=500)).wait_s <= 50
        with redis.Redis.from_url(redis_url) as client:
            tokens = client.hget(f"{KEY_PREFIX}{{far}}", "tokens")
            assert isinstance(tokens, bytes) and float(tokens) == 5 - 500

    run(redis_url, use)


def test_places_are_shared_and_given_up(redis_url: str) -> None:
    spec = endpoint(concurrency=3)

    async def use(one: EndpointLimits, other: EndpointLimits) -> None:
        held = [await one.take(spec, tokens=1), await one.take(spec, tokens=1), await other.take(spec, tokens=1)]
        assert [grant.wait_s for grant in held] == [0, 0, 0]
        assert await other.take(spec, tokens=1) == Grant(PLACE_WAIT_S)
        await one.settle(spec, held[0], tokens=None)
        await one.settle(spec, held[0], tokens=None)  # a place is given up once
        assert (await other.take(spec, tokens=1)).wait_s == 0
        assert (await one.take(spec, tokens=1)).wait_s == PLACE_WAIT_S

    run(redis_url, use, workers=2)


def test_the_places_of_a_dead_worker_are_free_after_a_while_and_those_of_a_live_one_are_not(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_limits, "RENEW_S", 0.05)
    spec = endpoint(concurrency=2)
    places = f"{KEY_PREFIX}{{far}}:leases"

    async def use(live: EndpointLimits, dead: EndpointLimits) -> None:
        await live.take(spec, tokens=1)
        await dead.take(spec, tokens=1)
        await dead.close()
        with redis.Redis.from_url(redis_url) as client:
            for lease in client.zrange(places, 0, -1):
                client.zadd(places, {lease: 1})  # as if its time were over
            await asyncio.to_thread(
                wait_until, lambda: client.zcount(places, 2, "+inf") == 1, 5.0, "the live worker renews"
            )
        assert (await live.take(spec, tokens=1)).wait_s == 0
        assert (await live.take(spec, tokens=1)).wait_s > 0

    run(redis_url, use, workers=2)


def test_redis_emptied_knows_the_places_again(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_limits, "RENEW_S", 0.05)
    spec = endpoint(concurrency=1, requests_per_minute=60_000)

    async def use(limits: EndpointLimits) -> None:
        await limits.take(spec, tokens=1)
        empty_redis(redis_url)
        with redis.Redis.from_url(redis_url) as client:
            await asyncio.to_thread(
                wait_until, lambda: client.exists(f"{KEY_PREFIX}{{far}}:leases"), 5.0, "the place is announced"
            )
        assert (await limits.take(spec, tokens=1)).wait_s > 0

    run(redis_url, use)


def test_a_429_lowers_the_rate_of_all_workers_once_a_second_and_time_raises_it(redis_url: str) -> None:
    spec = endpoint(requests_per_minute=6000)
    key = f"{KEY_PREFIX}{{far}}"

    async def use(one: EndpointLimits, other: EndpointLimits) -> None:
        await asyncio.gather(*[worker.learn(spec, None, throttled=True) for worker in (one, other) for _ in range(20)])
        with redis.Redis.from_url(redis_url, decode_responses=True) as client:
            assert float(client.hget(key, "factor") or 0) == pytest.approx(0.9, abs=1e-3)
            client.hincrbyfloat(key, "cut_at", -2)
            await one.learn(spec, None, throttled=True)
            assert float(client.hget(key, "factor") or 0) == pytest.approx(0.9 * 0.902, abs=2e-3)
            client.hset(key, mapping={"factor": "0.05", "cut_at": str(time.time() - 2)})
            await one.learn(spec, None, throttled=True)
            assert float(client.hget(key, "factor") or 0) == 0.05  # it is never cut to nothing
            client.hset(key, "cut_at", "1000000000")  # long ago
        assert await granted_in(other, spec, 0.2) >= 10

    run(redis_url, use, workers=2)


def test_limits_that_nobody_stated_are_learned_from_headers(redis_url: str) -> None:
    spec = endpoint()

    async def use(one: EndpointLimits, other: EndpointLimits) -> None:
        assert await one.take(spec, tokens=10**9) == Grant(0.0)
        with redis.Redis.from_url(redis_url) as client:
            assert not client.keys(f"{KEY_PREFIX}*")  # no trip for what has no limits
        seen = RatesSeen(limit_requests=6, remaining_requests=0, limit_tokens=60_000, remaining_tokens=59_000)
        await one.learn(spec, seen, throttled=False)
        assert 5 < (await one.take(spec, tokens=1)).wait_s <= 10
        assert await other.take(spec, tokens=1) == Grant(0.0)  # it has seen no header yet
        await other.learn(spec, seen, throttled=False)
        assert (await other.take(spec, tokens=1)).wait_s > 0

    run(redis_url, use, workers=2)


def test_headers_lower_what_was_stated_and_never_raise_it(redis_url: str) -> None:
    async def use(limits: EndpointLimits) -> None:
        stated_high, stated_low = endpoint("high", requests_per_minute=600), endpoint("low", requests_per_minute=3)
        for spec in (stated_high, stated_low):
            await limits.learn(spec, RatesSeen(limit_requests=6, remaining_requests=6), throttled=False)
        waits = {}
        for spec in (stated_high, stated_low):
            while (grant := await limits.take(spec, tokens=1)).wait_s == 0:
                pass
            waits[spec.name] = grant.wait_s
        assert 5 < waits["high"] <= 10 < waits["low"] <= 20

    run(redis_url, use)


def test_without_redis_all_may_go_and_one_warning_says_so() -> None:
    spec = endpoint(requests_per_minute=1, concurrency=1)

    async def use(limits: EndpointLimits) -> None:
        with capture_logs() as logs:
            for _ in range(20):
                grant = await limits.take(spec, tokens=10**6)
                assert grant.wait_s == 0
                await limits.settle(spec, grant, tokens=1)
                await limits.learn(spec, RatesSeen(limit_requests=1), throttled=True)
        assert [log["event"] for log in logs] == ["endpoint_limits_unreachable_all_may_go"]
        assert "secret" not in str(logs)

    run(NOWHERE, use)


def test_a_redis_that_hangs_holds_nothing_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_limits, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]

        async def use(limits: EndpointLimits) -> None:
            began = time.monotonic()
            for _ in range(100):
                assert (await limits.take(endpoint(concurrency=1), tokens=1)).wait_s == 0
            assert time.monotonic() - began < 5

        run(f"redis://127.0.0.1:{port}/0", use)
