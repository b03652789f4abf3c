"""Token buckets in a real Redis, and without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from structlog.testing import capture_logs

from store.rate_limits import LEAST_BURST, WRONG_KEYS_PER_MINUTE, RateLimits
from tests.support.waiting import wait_until

NOWHERE = "redis://:secret@127.0.0.1:1/0"


@pytest.fixture
def limits(redis_url: str) -> Iterator[RateLimits]:
    """Limits in an empty Redis."""
    opened = RateLimits(redis_url)
    yield opened
    opened.close()


def test_racing_threads_never_get_more_than_the_bucket(limits: RateLimits, redis_url: str) -> None:
    others = RateLimits(redis_url)  # a second gateway
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda n: (limits, others)[n % 2].take("key", 60), range(400)))
    most = LEAST_BURST * 1.5 + time.monotonic() - began + 1  # 15, and one a second
    allowed = [one for one in taken if one.wait_s == 0]
    assert LEAST_BURST <= len(allowed) <= most
    assert sorted(one.remaining or 0 for one in allowed)[-1] == 14
    assert all(0 < one.wait_s <= 1 for one in taken if one.wait_s)
    others.close()


def test_a_bucket_fills_while_nobody_asks_and_each_key_has_its_own(limits: RateLimits, redis_url: str) -> None:
    while limits.take("busy", 1200).wait_s == 0:
        pass
    assert limits.take("quiet", 1200).remaining == 1200 // 4 - 1
    wait_until(lambda: limits.take("busy", 1200).wait_s == 0, 5.0, "a twentieth of a second has passed")
    with redis.Redis.from_url(redis_url) as client:
        for name in client.scan_iter("stoker:limit:*"):
            left = client.pttl(name)  # what an idle key leaves is gone (-2) when it would be full
            assert left == -2 or 0 <= left <= 15_000


def test_a_lower_limit_holds_at_once(limits: RateLimits) -> None:
    assert limits.take("key", 6000).remaining == 1499
    assert limits.take("key", 1).remaining == LEAST_BURST - 1
    waits = [limits.take("key", 1).wait_s for _ in range(LEAST_BURST)]
    assert waits[:-1] == [0.0] * (LEAST_BURST - 1) and 30 < waits[-1] <= 60


def test_an_address_that_fails_is_refused_and_its_right_neighbours_are_not(limits: RateLimits) -> None:
    limits.welcome("2001:db8::1", b"right")
    for host in range(WRONG_KEYS_PER_MINUTE):
        assert limits.refused_s(f"2001:db8::{host:x}", b"wrong") == 0
        limits.failed(f"2001:db8::{host:x}")
    assert 0 < limits.refused_s("2001:db8::ffff", b"wrong") <= 2
    assert limits.refused_s("2001:db8::1", None) > 0
    assert limits.refused_s("2001:db8::1", b"right") == 0
    assert limits.refused_s("2001:db8:0:1::1", b"wrong") == limits.refused_s("192.0.2.1", b"wrong") == 0


def test_without_redis_all_is_allowed_and_one_warning_says_so() -> None:
    limits = RateLimits(NOWHERE)
    with capture_logs() as logs:
        for _ in range(50):
            assert limits.take("key", 1).wait_s == 0
            limits.failed("192.0.2.1")
            assert limits.refused_s("192.0.2.1", None) == 0
    assert [(log["event"], log["log_level"]) for log in logs] == [("rate_limits_unreachable_all_allowed", "warning")]
    assert "secret" not in str(logs)
    limits.close()
