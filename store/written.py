"""The statement that writes results: its text, and the columns that it takes.

It inserts, counts on the shard and in `usage`, and copies to followers at once: whoever dies leaves all of it or none.
What it counts is what it inserted: repeated, it counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import TextClause, text

from models.jobs import JobResult
from store.arrays import Float4s, Int2s, Int4s, Int8s, Texts
from store.followers import FOLLOWERS_OF_WRITTEN
from store.usage import USAGE_OF_WRITTEN

Column = TypeVar("Column", bound=list[Any])

_COUNTED = (
    "outcome, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, cache_entry_id, namespace_id, "
    "source, engine_id, cost"
)
_COPIED = "batch_id, seq, status_code, response, error_code, error_message, similarity, stoker"
# Planning it costs as much as counting usage does; a write that has nothing from the cache is spared it.
_SAVED = """coalesce((
            SELECT sum(e.tokens) FROM i CROSS JOIN LATERAL (
                SELECT prompt_tokens + completion_tokens AS tokens
                FROM cache_entries WHERE id = i.cache_entry_id OFFSET 0) AS e), 0)"""


@cache
def write_of(*, told: str, followed: bool, served: bool) -> TextClause:
    """The write; `told` is what it answers: `done`, the shard's finished jobs, or `inserted`, the seqs of its new rows.

    `followed`: results may have followers. `served`: some may be from the cache.
    """
    returned = f"{_COUNTED}, {_COPIED}" if followed else f"{_COUNTED}, seq"
    followers, total = (FOLLOWERS_OF_WRITTEN, "with_followers") if followed else ("", "c")
    saved = _SAVED if served else "0"
    answer = {"done": "s.done", "inserted": "ARRAY(SELECT seq FROM i)"}[told]
    return text(f"""
WITH f AS (
    SELECT id, batch_id FROM shards WHERE id = :shard_id AND fence = :fence AND state = 'running'
    FOR NO KEY UPDATE
), i AS (
    INSERT INTO results (batch_id, seq, outcome, source, status_code, response, error_code, error_message,
        prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, duration_ms, cache_entry_id,
        namespace_id, similarity, stoker, engine_id, cost)
    SELECT f.batch_id, u.* FROM f, unnest(
        CAST(:seqs AS int4[]), CAST(:outcomes AS text[]), CAST(:sources AS text[]), CAST(:status_codes AS int2[]),
        CAST(:responses AS text[]), CAST(:error_codes AS text[]), CAST(:error_messages AS text[]),
        CAST(:prompt_tokens AS int4[]), CAST(:completion_tokens AS int4[]), CAST(:cached_tokens AS int4[]),
        CAST(:reasoning_tokens AS int4[]), CAST(:durations AS int4[]), CAST(:entries AS int8[]),
        CAST(:namespaces AS int8[]), CAST(:similarities AS float4[]), CAST(:stokers AS text[]),
        CAST(:engine_ids AS int4[]), CAST(:costs AS int8[])) AS u
    ON CONFLICT (batch_id, seq) DO NOTHING
    RETURNING {returned}
), c AS (
    SELECT count(*) AS done, count(*) FILTER (WHERE outcome = 'failed') AS failed,
        count(*) FILTER (WHERE outcome = 'truncated') AS truncated,
        count(*) FILTER (WHERE outcome = 'empty') AS empty,
        coalesce(sum(prompt_tokens), 0) AS prompt_tokens, coalesce(sum(completion_tokens), 0) AS completion_tokens,
        coalesce(sum(cached_tokens), 0) AS cached_tokens, coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens,
        0 AS followers, count(cache_entry_id) AS served,
        count(cache_entry_id) - count(namespace_id) AS exact, count(namespace_id) AS semantic, {saved} AS saved_tokens
    FROM i
){USAGE_OF_WRITTEN}{followers}
UPDATE shards s SET done = s.done + t.done, failed = s.failed + t.failed, truncated = s.truncated + t.truncated,
    empty = s.empty + t.empty, prompt_tokens = s.prompt_tokens + t.prompt_tokens,
    completion_tokens = s.completion_tokens + t.completion_tokens,
    cached_tokens = s.cached_tokens + t.cached_tokens, reasoning_tokens = s.reasoning_tokens + t.reasoning_tokens,
    followers = s.followers + t.followers, served = s.served + t.served, exact = s.exact + t.exact,
    semantic = s.semantic + t.semantic, saved_tokens = s.saved_tokens + t.saved_tokens,
    lease_until = clock_timestamp() + make_interval(secs => :lease_s)
FROM f, {total} t WHERE s.id = f.id RETURNING {answer}""")


def columns_of(results: Sequence[JobResult], *, engine_id: int | None) -> dict[str, Any]:
    """The values that a write takes of its results; `engine_id` is that of those which name no other."""
    return {
        "seqs": Int4s(r.seq for r in results),
        "outcomes": Texts(r.outcome.value for r in results),
        "sources": Texts(r.source.value for r in results),
        "status_codes": Int2s(r.status_code for r in results),
        "responses": Texts(r.response for r in results),
        "error_codes": _seldom(Texts(r.error_code for r in results)),
        "error_messages": _seldom(Texts(r.error_message for r in results)),
        "prompt_tokens": Int4s(r.usage.prompt_tokens for r in results),
        "completion_tokens": Int4s(r.usage.completion_tokens for r in results),
        "cached_tokens": Int4s(r.usage.cached_tokens for r in results),
        "reasoning_tokens": Int4s(r.usage.reasoning_tokens for r in results),
        "durations": Int4s(r.duration_ms for r in results),
        "entries": _seldom(Int8s(r.entry for r in results)),
        "namespaces": _seldom(Int8s(r.namespace for r in results)),
        "similarities": _seldom(Float4s(r.similarity for r in results)),
        "stokers": _seldom(Texts(r.stoker for r in results)),
        "engine_ids": Int4s(r.engine_id or engine_id for r in results),
        "costs": _seldom(Int8s(r.cost for r in results)),
    }


def _seldom(column: Column) -> Column:
    """The column, or an empty one if it has nothing: `unnest` fills it up, and there is less to send."""
    if column.count(None) == len(column):
        column.clear()
    return column
