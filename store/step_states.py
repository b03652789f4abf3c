"""Finished steps of jobs of several requests in Redis, in front of Postgres. May be lost at any time.

A reply is here before the next request is sent, and in Postgres with its attempt's next write. When Redis is down a
worker that dies loses what it had not yet written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import redis

from runtime.logs import get_logger
from runtime.settings import without_secrets
from store.recent import REST_S, TIMEOUT_S

log = get_logger(__name__)

STEPS_PREFIX: Final = "stoker:steps:"
TTL_S: Final = 7 * 86_400  # chosen: longer than any window; a job that ends takes its steps with it
LARGEST_BYTES: Final = 1024 * 1024  # a longer reply is in Postgres half a second later


class StepStates:
    """Replies by job and step. Raises nothing: what Redis does not say is not there."""

    def __init__(self, url: str) -> None:
        self._address = without_secrets(url)
        self._redis = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
        )
        self._rests_until = 0.0

    def find(self, batch_id: UUID, seqs: Sequence[int]) -> dict[int, dict[str, str]]:
        """The replies of these jobs' finished steps, by seq and step."""
        if not seqs or self._is_resting():
            return {}
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for seq in seqs:
                    pipeline.hgetall(_key(batch_id, seq))
                found = pipeline.execute()
        except redis.RedisError as error:
            self._rest(error)
            return {}
        return {seq: replies for seq, replies in zip(seqs, found, strict=True) if replies}

    def keep(self, batch_id: UUID, seq: int, step: str, reply: str) -> str | None:
        """Keep a step's reply if it is the first, and return the one that stands; None if Redis does not answer.

        So an attempt that has lost its fence unawares and the one after it go on from the same replies.
        """
        if len(reply) > LARGEST_BYTES or self._is_resting():
            return None
        key = _key(batch_id, seq)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hsetnx(key, step, reply)
                pipeline.expire(key, TTL_S)
                pipeline.hget(key, step)
                stands: str | None = pipeline.execute()[-1]
        except redis.RedisError as error:
            self._rest(error)
            return None
        return stands

    def forget(self, batch_id: UUID, seqs: Sequence[int]) -> None:
        """Take out the steps of jobs that have ended; what cannot be reached now expires later."""
        if not seqs or self._is_resting():
            return
        try:
            self._redis.delete(*(_key(batch_id, seq) for seq in seqs))
        except redis.RedisError as error:
            self._rest(error)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _is_resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def _rest(self, error: redis.RedisError) -> None:
        self._rests_until = time.monotonic() + REST_S
        log.warning("step_states_unreachable", redis=self._address, error=str(error))


def _key(batch_id: UUID, seq: int) -> str:
    return f"{STEPS_PREFIX}{batch_id.hex}:{seq}"
