"""What registered endpoints may be asked, of all workers together: buckets and places in Redis. May be lost any time.

Requests a minute and tokens a minute are token buckets that hold half a second's worth, so that a provider which counts
strictly sees no burst; requests at once are leases. They are learned downwards, from 429s and from what answers'
headers say. Without Redis all may go, with a warning once a minute: the endpoint still says no, and the router hears.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Any, Final, cast
from uuid import uuid4

import redis.asyncio
from redis.exceptions import RedisError

from models.endpoints import EndpointSpec, Grant, RatesSeen
from runtime.logs import get_logger
from runtime.settings import without_secrets

log = get_logger(__name__)

KEY_PREFIX: Final = "stoker:endpoint:"
# Chosen: providers smooth over a second or more, and what leaves evenly may arrive half a second apart.
BURST_S: Final = 0.5
LEASE_S: Final = 30.0
RENEW_S: Final = 10.0  # a third of the lease: two renewals may be lost
CUT: Final = 0.9  # of the rate on a 429, at most once a second
LEAST_FACTOR: Final = 0.05
RECOVERY_PER_S: Final = 0.001  # +1% of the rate in ten seconds without a 429
LEARNED_S: Final = 3600  # how long limits are remembered that headers stated, and levels that nobody asks for
LEARN_EVERY_S: Final = 0.25  # headers that say nothing new are not passed on more often
PLACE_WAIT_S: Final = 0.05  # to look for a place again; nobody can know when one becomes free
TIMEOUT_S: Final = 2.0  # a child's loop may be busy for a part of it
REST_S: Final = 5.0
WARN_EVERY_S: Final = 60.0
CANCEL_S: Final = 0.5  # a call of Redis that ends at the same moment swallows a cancellation: then once more
CONNECTIONS: Final = 8
UNLIMITED: Final = Grant(0.0)

# KEYS: the endpoint's hash, its leases. Redis's clock, so that workers need not agree; one that is set back refills
# nothing. A limit is the lower one of the stated and the learned; 0: none.
_STATE: Final = f"""
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local held = redis.call('HMGET', KEYS[1],
    'at', 'requests', 'tokens', 'factor', 'cut_at', 'seen_requests', 'seen_tokens')
local function lower(stated, seen)
    stated, seen = tonumber(stated), tonumber(seen or '0')
    if stated == 0 then return seen end
    if seen == 0 then return stated end
    return math.min(stated, seen)
end
local cut_at = tonumber(held[5] or '0')
local factor = math.min(1, tonumber(held[4] or '1') + math.max(0, now - cut_at) * {RECOVERY_PER_S})
local request_rate = lower(ARGV[1], held[6]) / 60 * factor
local token_rate = lower(ARGV[2], held[7]) / 60 * factor
local request_room = math.max(1, request_rate * {BURST_S})
local token_room = math.max(1, token_rate * {BURST_S})
local passed = held[1] and math.max(0, now - tonumber(held[1])) or 0
local function level(was, rate, room)
    if rate == 0 or not was then return room end
    return math.min(room, tonumber(was) + passed * rate)
end
local requests = level(held[2], request_rate, request_room)
local tokens = level(held[3], token_rate, token_room)
local function keep(...)
    redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now), 'requests', string.format('%.6f', requests),
        'tokens', string.format('%.6f', tokens), ...)
    redis.call('EXPIRE', KEYS[1], {LEARNED_S})
end
"""

# ARGV: requests and tokens a minute, places, tokens wanted, the lease. Answers seconds to wait; all or nothing. A wish
# for more tokens than the bucket holds goes when it is full, and leaves it below zero.
_TAKE: Final = (
    _STATE
    + f"""
local places, wanted = tonumber(ARGV[3]), tonumber(ARGV[4])
local wait = 0
if request_rate > 0 and requests < 1 then
    wait = (1 - requests) / request_rate
end
local needed = math.min(wanted, token_room)
if token_rate > 0 and tokens < needed then
    wait = math.max(wait, (needed - tokens) / token_rate)
end
if places > 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
    if redis.call('ZCARD', KEYS[2]) >= places then
        wait = math.max(wait, {PLACE_WAIT_S})
    end
end
if wait > 0 then
    return string.format('%.6f', math.max(wait, 0.001))
end
if places > 0 then
    redis.call('ZADD', KEYS[2], now + {LEASE_S}, ARGV[5])
    redis.call('EXPIRE', KEYS[2], math.ceil(2 * {LEASE_S}))
end
requests, tokens = requests - 1, tokens - wanted
keep()
return '0'
"""
)

# ARGV: requests and tokens a minute, the lease ('': none), tokens to give back (below zero: more were used).
_SETTLE: Final = (
    _STATE
    + """
if ARGV[3] ~= '' then
    redis.call('ZREM', KEYS[2], ARGV[3])
end
if tonumber(ARGV[4]) ~= 0 then
    tokens = math.min(token_room, tokens + tonumber(ARGV[4]))
    keep()
end
return '0'
"""
)

# ARGV: requests and tokens a minute, whether there was a 429, then of requests and of tokens: the limit that was seen
# (0: none), what remains (-1: not known). Answers the two learned limits.
_LEARN: Final = (
    _STATE
    + f"""
local seen_requests, seen_tokens = tonumber(held[6] or '0'), tonumber(held[7] or '0')
if tonumber(ARGV[4]) > 0 then seen_requests = tonumber(ARGV[4]) end
if tonumber(ARGV[5]) > 0 then seen_tokens = tonumber(ARGV[5]) end
if tonumber(ARGV[6]) >= 0 then requests = math.min(requests, tonumber(ARGV[6])) end
if tonumber(ARGV[7]) >= 0 then tokens = math.min(tokens, tonumber(ARGV[7])) end
if ARGV[3] == '1' then
    requests, tokens = math.min(requests, 0), math.min(tokens, 0)
    if now - cut_at >= 1 then
        factor, cut_at = math.max({LEAST_FACTOR}, factor * {CUT}), now
        redis.call('HSET', KEYS[1], 'factor', string.format('%.6f', factor), 'cut_at', string.format('%.6f', now))
    end
end
keep('seen_requests', seen_requests, 'seen_tokens', seen_tokens)
return {{seen_requests, seen_tokens}}
"""
)

# KEYS: leases of endpoints; ARGV: a lease of each. One that Redis has lost is there again.
_RENEW: Final = f"""
local clock = redis.call('TIME')
local till = clock[1] + clock[2] / 1000000 + {LEASE_S}
for place, key in ipairs(KEYS) do
    redis.call('ZADD', key, till, ARGV[place])
    redis.call('EXPIRE', key, math.ceil(2 * {LEASE_S}))
end
return #KEYS
"""


@dataclass(slots=True)
class _Learned:
    """What this process knows of an endpoint's headers."""

    requests: int = 0
    tokens: int = 0
    passed_on_at: float = -math.inf


class EndpointLimits:
    """The limits of all registered endpoints, for the running loop. Raises nothing."""

    def __init__(self, url: str) -> None:
        self._address = without_secrets(url)
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
        )
        self._redis = redis.asyncio.Redis(connection_pool=pool)
        self._pool = pool
        self._take = self._redis.register_script(_TAKE)
        self._settle = self._redis.register_script(_SETTLE)
        self._learn = self._redis.register_script(_LEARN)
        self._renew = self._redis.register_script(_RENEW)
        self._process = uuid4().hex[:12]
        self._granted = 0
        self._leases: dict[str, str] = {}  # lease → the key of the places that it is one of
        self._renewing: asyncio.Task[None] | None = None
        self._learned: dict[str, _Learned] = {}
        self._rests_until = -math.inf
        self._warned_at = -math.inf

    async def take(self, spec: EndpointSpec, *, tokens: int) -> Grant:
        """Leave for one request that is thought to take so many tokens, or how long to wait before asking again."""
        if not self._is_limited(spec) or self._rests():
            return UNLIMITED
        self._granted += 1
        lease = f"{self._process}-{self._granted}:{tokens}"
        try:
            wait_s = float(await self._call(self._take, spec, spec.concurrency or 0, tokens, lease))
        except RedisError as error:
            self._rest(error)
            return UNLIMITED
        if wait_s > 0:
            return Grant(wait_s)
        if spec.concurrency:
            self._leases[lease] = _keys(spec)[1]
            self._keep_renewing()
        return Grant(0.0, lease)

    async def settle(self, spec: EndpointSpec, grant: Grant, *, tokens: int | None) -> None:
        """A request is over, and took so many tokens; None: as many as it was thought to. Idempotent it is not."""
        if not grant.lease:
            return
        has_place = self._leases.pop(grant.lease, None) is not None
        thought = int(grant.lease.rpartition(":")[2])
        back = 0 if tokens is None else thought - tokens
        if (not has_place and not back) or self._rests():
            return
        try:
            await self._call(self._settle, spec, grant.lease if has_place else "", back)
        except RedisError as error:
            self._rest(error)

    async def learn(self, spec: EndpointSpec, seen: RatesSeen | None, *, throttled: bool) -> None:
        """What an answer's headers said of the limits, and whether it was a 429: from now on for all workers."""
        now = time.monotonic()
        learned = self._learned.setdefault(spec.name, _Learned())
        seen = seen or RatesSeen()
        is_new = (seen.limit_requests or learned.requests, seen.limit_tokens or learned.tokens) != (
            learned.requests,
            learned.tokens,
        )
        if not (throttled or is_new) and now < learned.passed_on_at + LEARN_EVERY_S:
            return
        learned.requests = seen.limit_requests or learned.requests
        learned.tokens = seen.limit_tokens or learned.tokens
        if self._rests() or not self._is_limited(spec):
            return
        learned.passed_on_at = now
        told = (seen.limit_requests, seen.limit_tokens), (seen.remaining_requests, seen.remaining_tokens)
        limits, remaining = ([limit or 0 for limit in told[0]], [-1 if left is None else left for left in told[1]])
        try:
            await self._call(self._learn, spec, int(throttled), *limits, *remaining)
        except RedisError as error:
            self._rest(error)

    async def close(self) -> None:
        """Close the connections. Places that are still held end by themselves."""
        while self._renewing is not None and not self._renewing.done():
            self._renewing.cancel()
            await asyncio.wait([self._renewing], timeout=CANCEL_S)
        await self._redis.aclose()
        await self._pool.disconnect()

    def _is_limited(self, spec: EndpointSpec) -> bool:
        learned = self._learned.get(spec.name)
        stated = spec.requests_per_minute or spec.tokens_per_minute or spec.concurrency
        return bool(stated or (learned is not None and (learned.requests or learned.tokens)))

    async def _call(self, script: Any, spec: EndpointSpec, *arguments: int | str) -> bytes:
        stated = (spec.requests_per_minute or 0, spec.tokens_per_minute or 0)
        return cast(bytes, await script(keys=_keys(spec), args=[*stated, *arguments]))

    def _keep_renewing(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_leases(), name="endpoint-leases")

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            if not self._leases or self._rests():
                continue
            leases = dict(self._leases)
            try:
                await self._renew(keys=list(leases.values()), args=list(leases))
                for lease, key in leases.items():
                    if lease not in self._leases:  # it ended meanwhile, and was put back
                        await self._redis.zrem(key, lease)
            except RedisError as error:
                self._rest(error)

    def _rests(self) -> bool:
        return time.monotonic() < self._rests_until

    def _rest(self, error: RedisError) -> None:
        now = time.monotonic()
        self._rests_until = now + REST_S
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning("endpoint_limits_unreachable_all_may_go", redis=self._address, error=str(error))


def _keys(spec: EndpointSpec) -> list[str]:
    """Its hash and its leases; the braces keep both on one node of a cluster."""
    return [f"{KEY_PREFIX}{{{spec.name}}}", f"{KEY_PREFIX}{{{spec.name}}}:leases"]
