"""How much a key may ask, and how often an address may fail to show one: token buckets in Redis. May be lost any time.

Without Redis all is allowed, with a warning once a minute: a limit guards the engine's owner against a client gone
wild, and a door that is shut whenever Redis restarts guards nobody.
"""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import redis

from runtime.logs import get_logger
from runtime.settings import without_secrets

log = get_logger(__name__)

KEY_PREFIX: Final = "stoker:limit:key:"
ADDRESS_PREFIX: Final = "stoker:limit:address:"
BURST_SHARE: Final = 4  # a bucket holds a quarter of a minute's requests
LEAST_BURST: Final = 10  # a client begins with some requests at once, whatever its rate
WRONG_KEYS_PER_MINUTE: Final = 30
TIMEOUT_S: Final = 0.5
REST_S: Final = 5.0  # after a failure, so that a Redis which hangs does not slow every request
WARN_EVERY_S: Final = 60.0
WELCOME_S: Final = 86_400.0
WELCOME_PLACES: Final = 10_000

# ARGV: tokens a second, the most that the bucket holds, tokens to take (0: look). Answers {seconds to wait, left}.
# Redis's clock, so that gateways need not agree; one that is set back refills nothing until the bucket is forgotten.
_TAKE: Final = """
local rate, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local held = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = burst
if held[1] then
    tokens = math.min(burst, tonumber(held[1]) + math.max(0, now - tonumber(held[2])) * rate)
end
if tokens < 1 then
    return {string.format('%.6f', (1 - tokens) / rate), '0'}
end
if wanted > 0 then
    tokens = tokens - wanted
    redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.6f', now))
    redis.call('PEXPIRE', KEYS[1], math.ceil((burst - tokens) / rate * 1000))
end
return {'0', string.format('%.6f', tokens)}
"""


@dataclass(frozen=True, slots=True)
class Allowance:
    """`wait_s` is 0.0 if the request may go on; `remaining` requests may follow at once, None if that is not known."""

    wait_s: float
    remaining: int | None


_UNKNOWN: Final = Allowance(0.0, None)


class RateLimits:
    """The limits of all keys and addresses. Raises nothing; threads share it.

    `addresses` begins what is remembered of addresses: each door counts its own.
    """

    def __init__(
        self, url: str, *, wrong_keys_per_minute: int = WRONG_KEYS_PER_MINUTE, addresses: str = ADDRESS_PREFIX
    ) -> None:
        self._addresses = addresses
        self._wrong_keys_per_minute = wrong_keys_per_minute
        self._address = without_secrets(url)
        self._redis = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._take = self._redis.register_script(_TAKE)
        self._rests_until = 0.0
        self._warned_at = -math.inf
        self._welcome: OrderedDict[tuple[str, bytes], float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key_id: str, per_minute: int) -> Allowance:
        """Take one request from a key's bucket, which fills evenly and holds a quarter of a minute's."""
        burst = max(per_minute // BURST_SHARE, LEAST_BURST)
        return self._ask(KEY_PREFIX + key_id, per_minute=per_minute, burst=burst, wanted=1)

    def refused_s(self, address: str, digest: bytes | None) -> float:
        """How long an address that failed too often is not listened to; 0.0: it is.

        A key that was right from there within a day is heard all the same: behind one address may be many clients,
        and only one of them wrong.
        """
        if digest is not None and self._is_welcome(address, digest):
            return 0.0
        return self._failures(address, wanted=0)

    def failed(self, address: str) -> None:
        """An address has shown no key, or a wrong one."""
        self._failures(address, wanted=1)

    def welcome(self, address: str, digest: bytes) -> None:
        """An address has shown a right key."""
        with self._lock:
            self._welcome[address, digest] = time.monotonic() + WELCOME_S
            self._welcome.move_to_end((address, digest))
            if len(self._welcome) > WELCOME_PLACES:
                self._welcome.popitem(last=False)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _is_welcome(self, address: str, digest: bytes) -> bool:
        with self._lock:
            return self._welcome.get((address, digest), -math.inf) > time.monotonic()

    def _failures(self, address: str, *, wanted: int) -> float:
        bucket = self._addresses + _network(address)
        return self._ask(
            bucket, per_minute=self._wrong_keys_per_minute, burst=self._wrong_keys_per_minute, wanted=wanted
        ).wait_s

    def _ask(self, bucket: str, *, per_minute: int, burst: int, wanted: int) -> Allowance:
        if time.monotonic() < self._rests_until:
            return _UNKNOWN
        try:
            wait_s, tokens = self._take(keys=[bucket], args=[per_minute / 60, burst, wanted])
        except redis.RedisError as error:
            self._rest(error)
            return _UNKNOWN
        return Allowance(float(wait_s), math.floor(float(tokens)))

    def _rest(self, error: redis.RedisError) -> None:
        now = time.monotonic()
        with self._lock:
            self._rests_until = now + REST_S
            if now - self._warned_at < WARN_EVERY_S:
                return
            self._warned_at = now
        log.warning("rate_limits_unreachable_all_allowed", redis=self._address, error=str(error))


def _network(address: str) -> str:
    """The address; of IPv6 its first 64 bits, as the others are the client's to choose."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a socket's path, or a test's client
        return address
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
