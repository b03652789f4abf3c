"""Recent answers in Redis, in front of Postgres. May be lost at any time; when it is down it knows nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import redis

from models.jobs import CachedAnswer
from runtime.logs import get_logger
from runtime.settings import without_secrets

log = get_logger(__name__)

KEY_PREFIX: Final = "stoker:answer:"
LARGEST_BYTES: Final = 64 * 1024  # a longer answer is read from Postgres
TIMEOUT_S: Final = 0.5
REST_S: Final = 5.0  # after a failure, so that a Redis which hangs does not slow every shard

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(CachedAnswer)


class RecentAnswers:
    """Answers by key. Raises nothing: what Redis does not say is not there."""

    def __init__(self, url: str, *, ttl_s: float) -> None:
        self._address = without_secrets(url)
        self._ttl_s = int(ttl_s)
        self._redis = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._rests_until = 0.0

    def find(self, keys: Sequence[bytes]) -> dict[bytes, CachedAnswer]:
        """The answers that are there."""
        if not keys or self._is_resting():
            return {}
        try:
            values = self._redis.mget([KEY_PREFIX + key.hex() for key in keys])
        except redis.RedisError as error:
            self._rest(error)
            return {}
        return {key: answer for key, value in zip(keys, values, strict=True) if (answer := _read(value)) is not None}

    def keep(self, answers: Mapping[bytes, CachedAnswer]) -> None:
        """Keep answers for the time to live."""
        small = {key: answer for key, answer in answers.items() if len(answer.response) <= LARGEST_BYTES}
        if not small or self._is_resting():
            return
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for key, answer in small.items():
                    pipeline.set(KEY_PREFIX + key.hex(), _ENCODER.encode(answer), ex=self._ttl_s)
                pipeline.execute()
        except redis.RedisError as error:
            self._rest(error)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _is_resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def _rest(self, error: redis.RedisError) -> None:
        self._rests_until = time.monotonic() + REST_S
        log.warning("recent_answers_unreachable", redis=self._address, error=str(error))


def _read(value: bytes | str | None) -> CachedAnswer | None:
    try:
        return _DECODER.decode(value) if isinstance(value, bytes) else None
    except msgspec.MsgspecError:  # written by another version
        return None
