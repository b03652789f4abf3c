"""What Redis's library raises, as our errors: the same words wherever it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from runtime.errors import ServiceUnreachable


@contextmanager
def redis_errors(address: str) -> Iterator[None]:
    """What Redis's library raises becomes ServiceUnreachable, a lock that was lost included."""
    try:
        yield
    except redis.exceptions.LockError as error:
        raise ServiceUnreachable(f"Redis at {address} was emptied or slow, and the lead is lost: {error}") from error
    except (redis.RedisError, asyncio.IncompleteReadError) as error:
        raise ServiceUnreachable(
            f"Redis at {address} does not answer: {error}; check STOKER_REDIS__URL and that it runs"
        ) from error
