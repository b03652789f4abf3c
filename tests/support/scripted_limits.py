"""The scripted endpoint's limits: buckets of requests and tokens a minute, that hold a second's worth, as they say."""

from __future__ import annotations

import math
import time


class Bucket:
    """Holds what a second brings, and at least one piece; more than it holds is given when it is full."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self.size = max(1.0, per_minute / 60)
        self.level = self.size
        self._at = time.monotonic()

    def wait_s(self, wish: float) -> float:
        """How long until so much may be taken; 0: now."""
        now = time.monotonic()
        self.level = min(self.size, self.level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, min(wish, self.size) - self.level) * 60 / self.per_minute

    def headers(self, kind: str) -> dict[str, str]:
        """As OpenAI says it."""
        reset_s = max(0.0, self.size - self.level) * 60 / self.per_minute
        reset = f"{reset_s:.3f}s" if reset_s >= 1 else f"{math.ceil(reset_s * 1000)}ms"
        return {
            f"x-ratelimit-limit-{kind}": str(round(self.per_minute)),
            f"x-ratelimit-remaining-{kind}": str(max(0, int(self.level))),
            f"x-ratelimit-reset-{kind}": reset,
        }


class Limits:
    """Requests and tokens a minute; 0: as many as come."""

    def __init__(self, *, requests_per_minute: float = 0, tokens_per_minute: float = 0) -> None:
        self._buckets = {
            kind: Bucket(limit)
            for kind, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute))
            if limit
        }

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def take(self, tokens: int) -> float:
        """0: taken, a request of so many tokens; else in how many seconds it may be."""
        wishes = {kind: tokens if kind == "tokens" else 1 for kind in self._buckets}
        wait_s = max(bucket.wait_s(wishes[kind]) for kind, bucket in self._buckets.items())
        if not wait_s:
            for kind, bucket in self._buckets.items():
                bucket.level -= wishes[kind]
        return wait_s

    def headers(self) -> dict[str, str]:
        """What an answer says of them."""
        return {name: value for kind, bucket in self._buckets.items() for name, value in bucket.headers(kind).items()}
