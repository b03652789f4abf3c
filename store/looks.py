"""When schedules were last looked for, as Redis knows it. May be lost at any time: it is only told to people."""

from __future__ import annotations

from datetime import UTC, datetime

import redis

from runtime.settings import without_secrets
from store.redis_errors import redis_errors

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
