"""Recent answers in Redis, in front of Postgres, and who is about to get one. May be lost at any time.

When Redis is down it knows nothing: answers are read from Postgres, and equal jobs may run more than once.
"""

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

ANSWER_PREFIX: Final = "stoker:answer:"
RUNNER_PREFIX: Final = "stoker:runner:"
LARGEST_BYTES: Final = 64 * 1024  # a longer answer is read from Postgres
TIMEOUT_S: Final = 0.5
REST_S: Final = 5.0  # after a failure, so that a Redis which hangs does not slow every shard
RUNNER_S: Final = 60  # how long others wait for the job that runs; then the next one runs itself

# A runner that took too long may have been followed by another.
_END: Final = "for i, key in ipairs(KEYS) do if redis.call('get', key) == ARGV[i] then redis.call('del', key) end end"

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(CachedAnswer)


class RecentAnswers:
    """Answers by key. Raises nothing: what Redis does not say is not there."""

    def __init__(self, url: str) -> None:
        self._address = without_secrets(url)
        self._redis = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._end = self._redis.register_script(_END)
        self._rests_until = 0.0

    def find(self, keys: Sequence[bytes]) -> dict[bytes, CachedAnswer]:
        """The answers that are there."""
        if not keys or self._is_resting():
            return {}
        try:
            values = self._redis.mget([ANSWER_PREFIX + key.hex() for key in keys])
        except redis.RedisError as error:
            self._rest(error)
            return {}
        return {key: answer for key, value in zip(keys, values, strict=True) if (answer := _read(value)) is not None}

    def keep(self, answers: Mapping[bytes, CachedAnswer]) -> None:
        """Keep answers until they expire."""
        small = {key: answer for key, answer in answers.items() if len(answer.response) <= LARGEST_BYTES}
        if not small or self._is_resting():
            return
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for key, answer in small.items():
                    pipeline.set(ANSWER_PREFIX + key.hex(), _ENCODER.encode(answer), exat=int(answer.expires_at))
                pipeline.execute()
        except redis.RedisError as error:
            self._rest(error)

    def begin(self, runners: Mapping[bytes, str]) -> set[bytes]:
        """Say who is about to run each key: the keys that another runs already.

        A runner that says so again, in a later attempt, still is the one.
        """
        if not runners or self._is_resting():
            return set()
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for key, runner in runners.items():
                    pipeline.set(RUNNER_PREFIX + key.hex(), runner, nx=True, get=True, ex=RUNNER_S)
                before = pipeline.execute()
        except redis.RedisError as error:
            self._rest(error)
            return set()
        return {
            key
            for (key, runner), held in zip(runners.items(), before, strict=True)
            if held is not None and held != runner.encode()
        }

    def end(self, runners: Sequence[tuple[bytes, str]]) -> None:
        """These runners of keys have ended, with an answer or without: whoever waits for them need not."""
        if not runners or self._is_resting():
            return
        try:
            self._end(keys=[RUNNER_PREFIX + key.hex() for key, _ in runners], args=[runner for _, runner in runners])
        except redis.RedisError as error:
            self._rest(error)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Take answers out. Raises ServiceUnreachable never: what cannot be reached now expires later."""
        for start in range(0, len(keys), 1_000):
            if self._is_resting():
                return
            try:
                self._redis.delete(*(ANSWER_PREFIX + key.hex() for key in keys[start : start + 1_000]))
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
        answer = _DECODER.decode(value) if isinstance(value, bytes) else None
    except msgspec.MsgspecError:  # written by another version
        return None
    return answer if answer is not None and answer.expires_at > time.time() else None
