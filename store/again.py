"""SQL of running lines again: copying the failed jobs of a batch, and taking over results of equal jobs.

Bodies and responses never leave Postgres. The new batch is validating and its caller holds its lease; of the
earlier batch nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import BatchState, Priority
from runtime.errors import NotFound
from store.open_shards import CutJob

TAKEN_SHARD_JOBS = 10_000  # as many as a shard may have; nobody runs these

# Postgres refuses to look into a JSON that holds \u0000 anywhere; what the text says is not asked here.
_FIELDS = "CAST(replace(j.body, '\\u0000', '\\u0001') AS json)"
# As models/lines.py estimates: bytes / 4, and the most that all completions of the line may generate.
_TOKENS = f"""octet_length(j.body) / 4 + CASE WHEN b.endpoint = '/v1/embeddings' THEN 0 ELSE
    CAST(coalesce(
        nullif(CAST({_FIELDS} -> 'max_completion_tokens' AS text), 'null'),
        nullif(CAST({_FIELDS} -> 'max_tokens' AS text), 'null'),
        CAST(b.max_output_tokens AS text), '0') AS numeric)
    * CAST(coalesce(nullif(CAST({_FIELDS} -> 'n' AS text), 'null'), '1') AS numeric)
    * CASE WHEN b.endpoint = '/v1/completions' AND json_typeof({_FIELDS} -> 'prompt') = 'array'
            AND json_typeof({_FIELDS} -> 'prompt' -> 0) <> 'number'
        THEN json_array_length({_FIELDS} -> 'prompt') ELSE 1 END
    END"""
# As models/line_settings.py has it, of a job j.
_STANDS_ALONE = """(j.stoker IS NOT NULL AND coalesce(CAST(j.stoker AS json) -> 'turns',
    CAST(j.stoker AS json) -> 'recipe', CAST(j.stoker AS json) -> 'collection') IS NOT NULL)"""


@dataclass(frozen=True, slots=True)
class EarlierBatch:
    """What a new batch takes over from an earlier one."""

    id: UUID
    state: BatchState
    priority: Priority
    endpoint: str
    input_name: str
    input_digest: str
    options: dict[str, Any]
    max_output_tokens: int | None
    weight: float
    failed: int


def read_earlier(session: Session, batch_id: UUID, *, tenant: str) -> EarlierBatch:
    """The batch. Raises NotFound when it is gone."""
    row = session.execute(
        text("""
        SELECT id, state, priority, endpoint, input_name, input_digest, options, max_output_tokens, weight,
            (SELECT CAST(coalesce(sum(s.failed), 0) AS int8) FROM shards s WHERE s.batch_id = b.id)
        FROM batches b WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL AND state <> 'validating'"""),
        {"id": batch_id, "tenant": tenant},
    ).one_or_none()
    if row is None:
        raise _gone(batch_id)
    identifier, state, priority, *rest = tuple(row)
    return EarlierBatch(identifier, BatchState(state), Priority(priority), *rest)


def hold_ended(session: Session, batch_id: UUID) -> None:
    """Keep an ended batch from retention to the end of the transaction. Raises NotFound when it is gone.

    Not for one that runs: every shard that closes would wait for it.
    """
    held = session.scalar(
        text("SELECT 1 FROM batches WHERE id = :id AND deleted_at IS NULL FOR SHARE"), {"id": batch_id}
    )
    if held is None:
        raise _gone(batch_id)


def copy_failed_jobs(
    session: Session, earlier_id: UUID, *, batch_id: UUID, after_seq: int, first_seq: int, limit: int
) -> tuple[int, list[CutJob]]:
    """Copy the next failed jobs after `after_seq`, numbered from `first_seq`: (the last old seq, the new jobs).

    No more jobs: (after_seq, []).
    """
    rows = session.execute(
        text(f"""
        WITH page AS (
            SELECT seq FROM results WHERE batch_id = :earlier AND seq > :after AND outcome = 'failed'
            ORDER BY seq LIMIT :limit
        ), f AS (
            SELECT seq, CAST(row_number() OVER (ORDER BY seq) AS int4) + :first - 1 AS new_seq FROM page
        ), i AS (
            INSERT INTO jobs (batch_id, seq, custom_id, body, stoker)
            SELECT :batch, f.new_seq, o.custom_id, o.body, o.stoker
            FROM f CROSS JOIN LATERAL (SELECT * FROM jobs WHERE batch_id = :earlier AND seq = f.seq OFFSET 0) AS o
            RETURNING batch_id, seq, body
        )
        SELECT f.seq, j.seq, CAST({_TOKENS} AS int8), octet_length(j.body)
        FROM i j JOIN f ON f.new_seq = j.seq JOIN batches b ON b.id = :batch ORDER BY j.seq"""),
        {"earlier": earlier_id, "batch": batch_id, "after": after_seq, "first": first_seq, "limit": limit},
    ).all()
    return (rows[-1][0] if rows else after_seq), [CutJob(seq, tokens, size) for _, seq, tokens, size in rows]


def take_results(session: Session, earlier_id: UUID, *, batch_id: UUID) -> int:
    """Give jobs of the new batch the succeeded results of equal jobs of the earlier one, in done shards: how many.

    Equal: the same custom_id and the same bytes of body; a line that states `"cache": "off"` itself is to run, and
    takes none; one whose answer depends on more than its body neither takes nor gives one. No tokens are counted,
    nothing was spent. The jobs stay in their open shards as well: cut these again.
    """
    session.execute(text("CREATE TEMP TABLE taken (seq int4, earlier_seq int4) ON COMMIT DROP"))
    # Postgres knows nothing of rows that were just copied; a nested loop over two batches would never end.
    session.execute(text("SET LOCAL enable_nestloop = off"))
    session.execute(
        text(f"""
        WITH old AS MATERIALIZED (
            SELECT j.seq, j.custom_id, sha256(convert_to(j.body, 'UTF8')) AS digest
            FROM jobs j JOIN results r ON r.batch_id = j.batch_id AND r.seq = j.seq
            WHERE j.batch_id = :earlier AND r.batch_id = :earlier AND r.outcome = 'succeeded' AND NOT {_STANDS_ALONE}
        ), new AS MATERIALIZED (
            SELECT seq, custom_id, sha256(convert_to(body, 'UTF8')) AS digest FROM jobs j
            WHERE batch_id = :batch AND coalesce(CAST(stoker AS json) ->> 'cache', '') <> 'off' AND NOT {_STANDS_ALONE}
        )
        INSERT INTO taken SELECT new.seq, old.seq FROM new JOIN old USING (custom_id, digest)"""),
        {"earlier": earlier_id, "batch": batch_id},
    )
    session.execute(text("SET LOCAL enable_nestloop = on"))
    session.execute(text("ANALYZE taken"))
    count: int = session.execute(text("SELECT count(*) FROM taken")).scalar_one()
    if count and _insert_taken(session, earlier_id, batch_id=batch_id) != count:
        raise _gone(earlier_id)
    return count


def _insert_taken(session: Session, earlier_id: UUID, *, batch_id: UUID) -> int:
    """Copy the results and count them in done shards: how many results there were."""
    count: int = session.execute(
        text("""
        WITH i AS (
            INSERT INTO results (batch_id, seq, outcome, source, status_code, response, error_code, error_message,
                prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, duration_ms, stoker, engine_id)
            SELECT :batch, t.seq, r.outcome, 'reused', r.status_code, r.response, r.error_code, r.error_message,
                0, 0, 0, 0, 0, r.stoker, r.engine_id
            FROM taken t JOIN results r ON r.batch_id = :earlier AND r.seq = t.earlier_seq
            RETURNING 1
        )
        SELECT count(*) FROM i"""),
        {"batch": batch_id, "earlier": earlier_id},
    ).scalar_one()
    session.execute(
        text("""
        INSERT INTO shards (batch_id, seqs, state, done)
        SELECT :batch, array_agg(seq ORDER BY seq), 'done', count(*)
        FROM (SELECT seq, (row_number() OVER (ORDER BY seq) - 1) / :jobs AS part FROM taken) AS cut
        GROUP BY part ORDER BY part"""),
        {"batch": batch_id, "jobs": TAKEN_SHARD_JOBS},
    )
    return count


def _gone(batch_id: UUID) -> NotFound:
    return NotFound(f"no batch {batch_id}; it may have been deleted meanwhile")
