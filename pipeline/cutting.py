"""Cutting jobs into shards, in their order: a shard ends at its most jobs, tokens or bytes.

It only counts; storing the shards is the caller's.
"""

from __future__ import annotations

from runtime.settings import ShardSettings


class ShardCutter:
    """Counts jobs one after the other and cuts where a bound is met.

    A shard keeps within the bounds unless a single job exceeds them.
    """

    def __init__(self, bounds: ShardSettings, *, first: int) -> None:
        self._bounds = bounds
        self._spans: list[tuple[int, int, int]] = []
        self._start = self._next = first
        self._tokens = self._bytes = 0

    def add(self, tokens: int, size_bytes: int) -> None:
        """Count the next job: its estimated tokens, prompt and most output, and the bytes of its body."""
        bounds, jobs = self._bounds, self._next - self._start
        total_tokens, total_bytes = self._tokens + tokens, self._bytes + size_bytes
        if jobs and (jobs >= bounds.max_jobs or total_tokens > bounds.max_tokens or total_bytes > bounds.max_bytes):
            self._spans.append((self._start, self._next - 1, self._tokens))
            self._start, total_tokens, total_bytes = self._next, tokens, size_bytes
        self._tokens, self._bytes = total_tokens, total_bytes
        self._next += 1

    def spans(self) -> list[tuple[int, int, int]]:
        """(first, last, tokens) of every shard, the last one ended here; places count from `first`."""
        rest = [(self._start, self._next - 1, self._tokens)] if self._next > self._start else []
        return [*self._spans, *rest]
