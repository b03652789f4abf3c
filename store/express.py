"""Single requests in Redis, from the gateway that holds them open to the worker that answers. May be lost any time.

Two leases keep each alive. The gateway's is its hash's: it goes with a client that has gone, or with the gateway. The
worker's is its score in the sorted set: the moment from which it is anybody's. A fence tells claims apart. What is
lost here its gateway puts again, for as long as the client waits; so a request may run twice, and is answered once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis import asyncio as aioredis

from runtime.settings import without_secrets
from store.redis_errors import redis_errors

PREFIX: Final = "stoker:express:"
WAITING: Final = PREFIX + "waiting"
HELD_S: Final = 15  # of a gateway's silence, after which nobody waits for its requests any more
LEASE_S: Final = 5  # of a worker's silence, after which its requests are another's
RENEW_S: Final = 1.0  # how often both say that they are there, so also how soon a cancelled request ends
ANSWER_S: Final = 60  # an answer that was told and not heard is looked for every RENEW_S
TIMEOUT_S: Final = 5.0

# Each in one step, by Redis's clock. KEYS[1] is the sorted set; ARGV[1] the prefix of the other keys.
_NOW: Final = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
"""
# ARGV: id, held_s, most, then the hash's fields and values. Answers 0 where there are too many.
_PUT: Final = f"""{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 3600)
if not redis.call('ZSCORE', KEYS[1], ARGV[2]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then
    return 0
end
redis.call('HSET', ARGV[1] .. ARGV[2], 'fence', 0, unpack(ARGV, 5))
redis.call('EXPIRE', ARGV[1] .. ARGV[2], ARGV[3])
redis.call('ZADD', KEYS[1], string.format('%.6f', now), ARGV[2])
return 1
"""
# ARGV: how many, lease_s. Answers the claimed ones, each as id, fence, path, trust, body, key.
_CLAIM: Final = f"""{_NOW}
local claimed = {{}}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.6f', now), 'LIMIT', 0, 1000)) do
    if #claimed >= tonumber(ARGV[2]) then break end
    local found = redis.call('HMGET', ARGV[1] .. id, 'path', 'trust', 'body', 'key')
    if found[1] then
        local fence = redis.call('HINCRBY', ARGV[1] .. id, 'fence', 1)
        redis.call('ZADD', KEYS[1], string.format('%.6f', now + ARGV[3]), id)
        table.insert(claimed, {{id, fence, found[1], found[2], found[3], found[4] or ''}})
    else
        redis.call('ZREM', KEYS[1], id)
    end
end
return claimed
"""
# ARGV: lease_s (0: give them back), then id and fence of each. Answers those that are still this worker's.
_EXTEND: Final = f"""{_NOW}
local kept = {{}}
for at = 3, #ARGV, 2 do
    if redis.call('HGET', ARGV[1] .. ARGV[at], 'fence') == ARGV[at + 1] then
        redis.call('ZADD', KEYS[1], string.format('%.6f', now + ARGV[2]), ARGV[at])
        table.insert(kept, ARGV[at])
    end
end
return kept
"""
# ARGV: id, fence, answer, how long it is kept. It is its door's to hear of it.
_ANSWER: Final = """
local held = redis.call('HMGET', ARGV[1] .. ARGV[2], 'fence', 'door')
if held[1] ~= ARGV[3] then return 0 end
redis.call('DEL', ARGV[1] .. ARGV[2])
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('SET', ARGV[1] .. 'answer:' .. ARGV[2], ARGV[4], 'EX', ARGV[5])
redis.call('PUBLISH', ARGV[1] .. 'door:' .. held[2], ARGV[2])
return 1
"""
# ARGV: held_s, then ids. Answers for each: 'answered', 'gone', 'waiting' or 'running'.
_RENEW: Final = f"""{_NOW}
local states = {{}}
for at = 3, #ARGV do
    local state = 'gone'
    if redis.call('EXISTS', ARGV[1] .. 'answer:' .. ARGV[at]) == 1 then
        state = 'answered'
    elseif redis.call('EXPIRE', ARGV[1] .. ARGV[at], ARGV[2]) == 1 then
        local score = redis.call('ZSCORE', KEYS[1], ARGV[at])
        state = score and (tonumber(score) > now and 'running' or 'waiting') or 'gone'
    end
    states[at - 2] = state
end
return states
"""
_CANCEL: Final = """
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('DEL', ARGV[1] .. 'answer:' .. ARGV[2])
local fence = redis.call('HGET', ARGV[1] .. ARGV[2], 'fence')
redis.call('DEL', ARGV[1] .. ARGV[2])
return fence == '0' and 1 or 0
"""


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """One request as a worker got it; `fence` counts the claims of it, `key_id` is who pays."""

    id: str
    fence: int
    path: str
    trust: str
    body: bytes
    key_id: str


class ExpressQueue:
    """The requests that wait, for the running loop. Every method raises ServiceUnreachable while Redis is away."""

    def __init__(self, url: str) -> None:
        self._address = without_secrets(url)
        self._redis: Any = aioredis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._scripts = {
            text: self._redis.register_script(text) for text in (_PUT, _CLAIM, _EXTEND, _ANSWER, _RENEW, _CANCEL)
        }

    async def put(self, id_: str, *, path: str, body: bytes, trust: str, key_id: str, door: str, most: int) -> bool:
        """Let it wait, its answer to be told at `door`; False where `most` are there already. Repeatable."""
        fields = ("path", path, "body", body, "trust", trust, "key", key_id, "door", door)
        return bool(await self._run(_PUT, id_, HELD_S, most, *fields))

    async def claim(self, most: int) -> list[ClaimedRequest]:
        """Those that have waited longest, for LEASE_S unless they are extended."""
        found = await self._run(_CLAIM, most, LEASE_S)
        return [
            ClaimedRequest(id_.decode(), fence, path.decode(), trust.decode(), body, key.decode())
            for id_, fence, path, trust, body, key in found
        ]

    async def extend(self, claimed: Sequence[ClaimedRequest]) -> set[str]:
        """The ids of those that are still this worker's; the others are cancelled, or another's."""
        return await self._leased(claimed, LEASE_S)

    async def give_back(self, claimed: Sequence[ClaimedRequest]) -> None:
        """Let others have them at once."""
        await self._leased(claimed, 0)

    async def answer(self, claimed: ClaimedRequest, answer: bytes) -> bool:
        """Tell what it has become; False where nobody waits for this worker's answer any more."""
        return bool(await self._run(_ANSWER, claimed.id, claimed.fence, answer, ANSWER_S))

    async def renew(self, ids: Sequence[str]) -> list[str]:
        """Say that these are still wanted. In their order: answered, running, waiting, or gone."""
        return [state.decode() for state in await self._run(_RENEW, HELD_S, *ids)]

    async def collect(self, id_: str) -> bytes | None:
        """The answer, which is then forgotten; None if there is none."""
        with redis_errors(self._address):
            answer: bytes | None = await self._redis.getdel(f"{PREFIX}answer:{id_}")
            return answer

    async def cancel(self, id_: str) -> bool:
        """Forget it; a worker that has it stops within RENEW_S. True if none ever had it."""
        return bool(await self._run(_CANCEL, id_))

    async def told(self, door: str) -> AsyncIterator[str]:
        """The ids of requests that are answered, as it happens; what is told meanwhile is lost."""
        with redis_errors(self._address):
            async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(f"{PREFIX}door:{door}")
                while True:
                    message = await pubsub.get_message(timeout=TIMEOUT_S)
                    if message is not None:
                        yield message["data"].decode()

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _leased(self, claimed: Iterable[ClaimedRequest], lease_s: int) -> set[str]:
        pairs = [part for one in claimed for part in (one.id, one.fence)]
        return {id_.decode() for id_ in await self._run(_EXTEND, lease_s, *pairs)}

    async def _run(self, script: str, *arguments: Any) -> Any:
        with redis_errors(self._address):
            return await self._scripts[script](keys=[WAITING], args=[PREFIX, *arguments])
