"""Cutting jobs into shards, in their order: a shard ends at its most jobs, tokens or bytes.

It only counts; storing the shards is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.lines import BYTES_PER_TOKEN
from pipeline.pace import SHARD_JOBS, jobs_in_a_shard, most_jobs_in_a_shard
from pipeline.prefixes import OrderedJobs
from runtime.settings import Settings, ShardSettings
from store.presence import WorkerPresence


def cut_ordered(jobs: OrderedJobs, bounds: ShardSettings) -> list[tuple[int, int, int]]:
    """(first, last, tokens) of the shards of jobs in a prefix order; places count from 0 in that order.

    A shard keeps within the bounds, and in its second half it ends where its jobs share least with the next one: a
    group of like prompts that fits stays in one shard, and so on one engine. One that does not is computed again by
    every engine that has a part of it, at most once in half a shard's jobs. A shard may thus be half as large
    as asked for.
    """
    most_jobs = bounds.max_jobs or SHARD_JOBS
    sizes = [jobs.sizes_bytes[place] for place in jobs.places]
    tokens = [size // BYTES_PER_TOKEN + jobs.output_tokens[at] for size, at in zip(sizes, jobs.places, strict=True)]
    spans: list[tuple[int, int, int]] = []
    start, count = 0, len(sizes)
    while start < count:
        end, sum_tokens, sum_bytes = start, 0, 0
        while end < count and end - start < most_jobs:
            sum_tokens += tokens[end]
            sum_bytes += sizes[end]
            if end > start and (sum_tokens > bounds.max_tokens or sum_bytes > bounds.max_bytes):
                break
            end += 1
        if end < count:
            end = min(range(end, start + (end - start) // 2, -1), key=jobs.shared.__getitem__)
        spans.append((start, end - 1, sum(tokens[start:end])))
        start = end
    return spans


class ShardCutter:
    """Counts jobs one after the other and cuts where a bound is met.

    A shard keeps within the bounds unless a single job exceeds them.
    """

    def __init__(self, bounds: ShardSettings, *, first: int) -> None:
        self._max_jobs, self._max_tokens, self._max_bytes = (
            bounds.max_jobs or SHARD_JOBS,
            bounds.max_tokens,
            bounds.max_bytes,
        )
        self._spans: list[tuple[int, int, int]] = []
        self._start = first
        self._jobs = self._tokens = self._bytes = 0  # of the shard that is not yet cut

    def add(self, tokens: int, size_bytes: int) -> None:
        """Count the next job: its estimated tokens, prompt and most output, and the bytes of its body."""
        self._jobs = jobs = self._jobs + 1
        self._tokens = all_tokens = self._tokens + tokens
        self._bytes = all_bytes = self._bytes + size_bytes
        if jobs > self._max_jobs or all_tokens > self._max_tokens or all_bytes > self._max_bytes:
            self._cut_before(tokens, size_bytes)

    def spans(self) -> list[tuple[int, int, int]]:
        """(first, last, tokens) of every shard, the last one ended here; places count from `first`."""
        rest = [(self._start, self._start + self._jobs - 1, self._tokens)] if self._jobs else []
        return [*self._spans, *rest]

    def _cut_before(self, tokens: int, size_bytes: int) -> None:
        """End the shard before its newest job, unless that is its only one."""
        others = self._jobs - 1
        if others:
            self._spans.append((self._start, self._start + others - 1, self._tokens - tokens))
            self._start += others
            self._jobs, self._tokens, self._bytes = 1, tokens, size_bytes


def for_workers(settings: Settings, workers: Sequence[WorkerPresence]) -> Settings:
    """The settings with a shard's jobs filled in, unless they are set: any of these workers may get any shard.

    As many as the fastest should have, but no more than the slowest does in some minutes.
    """
    sizes = [jobs_in_a_shard(worker.in_flight, worker.service_s) for worker in workers if worker.in_flight]
    if settings.shard.max_jobs is not None or not sizes:
        return settings
    most = min(most_jobs_in_a_shard(worker.in_flight, worker.service_s) for worker in workers if worker.in_flight)
    return settings.model_copy(update={"shard": settings.shard.model_copy(update={"max_jobs": min(max(sizes), most)})})
