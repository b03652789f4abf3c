"""Single requests in a real Redis: who has one, who may answer it, and what becomes of it where nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest
import redis

from runtime.errors import ServiceUnreachable
from store.express import WAITING, ClaimedRequest, ExpressQueue


def run(redis_url: str, story: Callable[[ExpressQueue], Awaitable[None]]) -> None:
    async def told() -> None:
        queue = ExpressQueue(redis_url)
        try:
            await story(queue)
        finally:
            await queue.close()

    asyncio.run(told())


async def put(queue: ExpressQueue, id_: str, *, most: int = 100) -> bool:
    return await queue.put(id_, path="/v1/completions", body=b"{}", trust="own", key_id="k", door="d", most=most)


def test_the_one_that_has_waited_longest_is_claimed_first_and_once(redis_url: str) -> None:
    async def story(queue: ExpressQueue) -> None:
        for id_ in ("a", "b", "c"):
            assert await put(queue, id_)
        first = await queue.claim(2)
        assert first == [ClaimedRequest(id_, 1, "/v1/completions", "own", b"{}", "k") for id_ in ("a", "b")]
        assert [one.id for one in await queue.claim(5)] == ["c"]
        assert await queue.claim(5) == []
        assert await queue.renew(["a", "x"]) == ["running", "gone"]
        assert await put(queue, "a")  # as who holds it does, unsure whether it was put
        assert await queue.renew(["a"]) == ["waiting"]

    run(redis_url, story)


def test_who_let_its_lease_end_has_lost_it(redis_url: str) -> None:
    async def story(queue: ExpressQueue) -> None:
        await put(queue, "a")
        [dead] = await queue.claim(1)
        with redis.Redis.from_url(redis_url) as client:
            client.zadd(WAITING, {"a": 1.0 + client.time()[0] - 60})  # a minute later, as Redis sees it
        [next_] = await queue.claim(1)
        assert (next_.id, next_.fence) == ("a", 2)
        assert await queue.extend([dead]) == set()
        assert not await queue.answer(dead, b"late")
        assert await queue.extend([next_]) == {"a"}
        await queue.give_back([next_])
        [third] = await queue.claim(1)
        assert await queue.answer(third, b"answer")
        assert await queue.renew(["a"]) == ["answered"]
        assert (await queue.collect("a"), await queue.collect("a")) == (b"answer", None)

    run(redis_url, story)


def test_a_cancelled_one_is_nobodys(redis_url: str) -> None:
    async def story(queue: ExpressQueue) -> None:
        await put(queue, "a")
        await put(queue, "b")
        [claimed] = await queue.claim(1)
        await queue.cancel("a")
        await queue.cancel("b")
        assert await queue.extend([claimed]) == set()
        assert await queue.claim(9) == []

    run(redis_url, story)


def test_there_are_never_more_than_may_be(redis_url: str) -> None:
    async def story(queue: ExpressQueue) -> None:
        assert await put(queue, "a", most=2)
        assert await put(queue, "b", most=2)
        assert not await put(queue, "c", most=2)
        assert await put(queue, "a", most=2)  # it is one of them
        await queue.cancel("b")
        assert await put(queue, "c", most=2)

    run(redis_url, story)


def test_one_whose_gateway_is_silent_is_forgotten(redis_url: str) -> None:
    async def story(queue: ExpressQueue) -> None:
        await put(queue, "a")
        with redis.Redis.from_url(redis_url) as client:
            assert 0 < client.ttl("stoker:express:a") <= 15
            client.delete("stoker:express:a")
        assert await queue.claim(1) == []
        with redis.Redis.from_url(redis_url) as client:
            assert not client.exists(WAITING)

    run(redis_url, story)


def test_an_answer_is_told_at_the_door_it_came_through(redis_url: str) -> None:
    async def story(queue: ExpressQueue) -> None:
        async with aclosing(queue.told("d")) as told:  # type: ignore[type-var]
            heard = asyncio.ensure_future(anext(told))
            with redis.Redis.from_url(redis_url) as client:
                while not client.pubsub_channels("stoker:express:door:d"):
                    await asyncio.sleep(0)
            await put(queue, "a")
            [claimed] = await queue.claim(1)
            await queue.answer(claimed, b"answer")
            assert await heard == "a"

    run(redis_url, story)


def test_without_redis_it_says_which_one_and_no_secret() -> None:
    async def story(queue: ExpressQueue) -> None:
        with pytest.raises(ServiceUnreachable, match=r"redis://:\*\*\*@127.0.0.1:1/0 .*STOKER_REDIS__URL"):
            await queue.claim(1)

    run("redis://:secret@127.0.0.1:1/0", story)
