"""When schedules were last looked for, as Redis knows it. May be lost at any time: it is only told to people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import redis

from runtime.errors import ServiceUnreachable
from runtime.settings import without_secrets

KEY = "stoker:schedules:looked"


class LookBoard:
    """The time of the last look. Raises ServiceUnreachable when Redis does not answer."""

    def __init__(self, url: str) -> None:
        self._address = without_secrets(url)
        self._redis = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)

    def note(self) -> None:
        """It is now."""
        with redis_errors(self._address):
            self._redis.set(KEY, datetime.now(UTC).isoformat())

    def last(self) -> datetime | None:
        """When it was; None if nobody looked since Redis was emptied."""
        with redis_errors(self._address):
            found = self._redis.get(KEY)
        return datetime.fromisoformat(found.decode()) if isinstance(found, bytes) else None

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


@contextmanager
def redis_errors(address: str) -> Iterator[None]:
    """What Redis's library raises becomes ServiceUnreachable, a lock that was lost included."""
    try:
        yield
    except redis.exceptions.LockError as error:
        raise ServiceUnreachable(f"Redis at {address} was emptied or slow, and the lead is lost: {error}") from error
    except redis.RedisError as error:
        raise ServiceUnreachable(
            f"Redis at {address} does not answer: {error}; check STOKER_REDIS__URL and that it runs"
        ) from error
