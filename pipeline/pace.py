"""How far ahead a worker child claims, and how large a shard is: from measured times, by Little's law."""

from __future__ import annotations

import math
from collections.abc import Callable

NEWEST = 0.05  # weight of the newest reading in a moving average: some twenty readings are remembered
LEAST_S = 0.001  # of a service time, which is known in whole milliseconds
CLAIMS = 2  # a reserve lasts as long as so many claims of the mean length

SHARD_JOBS = 64  # where nothing is known of the workers
LEAST_JOBS, MOST_JOBS = 16, 256  # chosen: the most that a crash runs again, and what one write holds (FLUSH_ROWS)
# A shard costs some 16 ms of CPU outside the engine, whatever its size (claim, close, hint, dispatch): before an engine
# that answers at once a job took 365 us with 64 in a shard and 171 with 256. So a child shall not claim more often.
SHARDS_A_SECOND = 5.0
MOST_S = 120.0  # chosen: so long may the last shard of a batch be waited for


class Pace:
    """Moving averages of how long one child's requests and claims take; 0 before the first."""

    def __init__(self, *, on_service: Callable[[float], None] = lambda _: None) -> None:
        self.service_s = self.claim_s = 0.0
        self._on_service = on_service

    def served(self, seconds: float) -> None:
        """One request was answered after so long, its wait in the engine's queue included."""
        self.service_s = _next(self.service_s, max(seconds, LEAST_S))
        self._on_service(self.service_s)

    def claimed(self, seconds: float) -> None:
        """A claim took so long, until its jobs were ready to be sent."""
        self.claim_s = _next(self.claim_s, seconds)

    def reserve(self, in_flight: int) -> int:
        """How many jobs must wait, at least, when the next claim begins, so that no place stays empty meanwhile.

        `in_flight` places that are each free again after `service_s` take in_flight / service_s jobs a second. More
        than there are places is never kept, and nothing before the first answer.
        """
        if not self.service_s:
            return 0
        return min(in_flight, math.ceil(CLAIMS * self.claim_s * in_flight / self.service_s))


def jobs_in_a_shard(in_flight: int, service_s: float) -> int:
    """How many jobs a shard should have for a child with so many places, whose jobs take so long (0: not known).

    No more than fill its places, so that shards are spread evenly over workers and the last ones end together; but
    enough that a fast engine's child does not claim more often than SHARDS_A_SECOND.
    """
    fills = min(in_flight, SHARD_JOBS)
    lasts = in_flight / service_s / SHARDS_A_SECOND if service_s else 0.0
    return max(LEAST_JOBS, min(MOST_JOBS, max(fills, round(lasts))))


def most_jobs_in_a_shard(in_flight: int, service_s: float) -> int:
    """What a child with so many places does in MOST_S, so that a shard that it gets is not the end of the batch."""
    return MOST_JOBS if not service_s else max(LEAST_JOBS, min(MOST_JOBS, round(in_flight / service_s * MOST_S)))


def _next(mean: float, reading: float) -> float:
    return reading if not mean else mean + NEWEST * (reading - mean)
