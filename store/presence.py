"""What live workers announce in Redis: children, served models, engine readings. May be lost at any time.

Nothing durable depends on it: without it dispatch keeps a small window and submit checks no model names.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis
from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.settings import without_secrets
from store.redis_errors import redis_errors

KEY_PREFIX = "stoker:worker:"
TTL_S = 15
ANNOUNCE_S = 5  # a third of the TTL: two announcements may be lost


class WorkerPresence(BaseModel):
    """One worker's announcement."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    node: str = "generation"
    children: int
    models: list[str]
    """What its own engine and endpoints serve."""
    external_models: list[str] = []
    """What external endpoints serve through it."""
    endpoints: list[str] = []
    """The registered endpoints that it can use, by name."""
    engine: str
    healthy: bool
    running: int | None = None
    waiting: int | None = None
    tokens_per_s: float | None = None
    """Output tokens of its engine, since its last reading; as the others None where nothing is known of it."""
    kv_use: float | None = None
    """Of the engine's room for keys and values, 0 to 1."""
    gpu_use: float | None = None
    """Of its GPUs' time, the mean, 0 to 1."""
    in_flight: int = 0
    """Requests that each child keeps in flight."""
    service_s: float = 0.0
    """How long they take, their wait in the engine's queue included; 0: not known."""


class PresenceBoard:
    """The live workers, as Redis knows them. Raises ServiceUnreachable when Redis does not answer."""

    def __init__(self, url: str) -> None:
        self._address = without_secrets(url)
        self._redis = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)

    def announce(self, presence: WorkerPresence) -> None:
        """Say that this worker lives; forgotten after 15 s."""
        with redis_errors(self._address):
            self._redis.set(KEY_PREFIX + presence.name, presence.model_dump_json(), ex=TTL_S)

    def withdraw(self, name: str) -> None:
        """Say that this worker has ended."""
        with redis_errors(self._address):
            self._redis.delete(KEY_PREFIX + name)

    def workers(self, *, node: str | None = "generation") -> list[WorkerPresence]:
        """Every live worker of a node; None: of all."""
        with redis_errors(self._address):
            keys = list(self._redis.scan_iter(match=KEY_PREFIX + "*", count=1000))
            values = self._redis.mget(keys) if keys else []
        found = [worker for worker in _parsed(values) if node in (None, worker.node)]
        return sorted(found, key=lambda worker: worker.name)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


def _parsed(values: Sequence[bytes | str | None]) -> list[WorkerPresence]:
    found = []
    for value in values:
        try:
            found.append(WorkerPresence.model_validate_json(value or b""))
        except ValidationError:  # expired meanwhile, or written by another version
            continue
    return found
