"""SQL of followers: jobs that equal another of their batch, their leader, and take its result.

A follower is in no shard. Who inserts a leader's result inserts those of its followers in the same statement, and
only for leaders' rows that this statement itself inserted: all of them are there or none, whatever dies when. Which
jobs follow is settled before a batch begins; only `release`, while no shard is open, changes it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.database import copy_cursor

# The rest of a write that inserted leaders as `i` and counted them as `c`: their followers' rows, and all together. A
# follower that did not fail counts as served, and saved what its leader took, or the entry's that served its leader.
FOLLOWERS_OF_WRITTEN = """
, w AS (
    SELECT i.*, x.seq AS follower FROM i CROSS JOIN LATERAL (
        SELECT seq FROM followers WHERE batch_id = :batch_id AND leader = i.seq OFFSET 0) AS x
), d AS (
    INSERT INTO results (batch_id, seq, outcome, source, status_code, response, error_code, error_message,
        prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, duration_ms, cache_entry_id,
        namespace_id, similarity, stoker, engine_id)
    SELECT w.batch_id, w.follower, w.outcome, 'duplicate', w.status_code, w.response, w.error_code, w.error_message,
        0, 0, 0, 0, 0, w.cache_entry_id, w.namespace_id, w.similarity, w.stoker, w.engine_id FROM w
    ON CONFLICT (batch_id, seq) DO NOTHING
    RETURNING outcome
), k AS (
    SELECT count(*) AS followers, count(*) FILTER (WHERE outcome = 'failed') AS failed,
        count(*) FILTER (WHERE outcome = 'truncated') AS truncated,
        count(*) FILTER (WHERE outcome = 'empty') AS empty,
        count(*) FILTER (WHERE outcome <> 'failed') AS served, coalesce((
            SELECT sum(w.prompt_tokens + w.completion_tokens + coalesce(e.tokens, 0)) FROM w LEFT JOIN LATERAL (
                SELECT prompt_tokens + completion_tokens AS tokens
                FROM cache_entries WHERE id = w.cache_entry_id OFFSET 0) AS e ON true
            WHERE w.outcome <> 'failed'
        ), 0) AS saved_tokens
    FROM d
), with_followers AS (
    SELECT c.done, c.failed + k.failed AS failed, c.truncated + k.truncated AS truncated, c.empty + k.empty AS empty,
        c.prompt_tokens, c.completion_tokens, c.cached_tokens, c.reasoning_tokens, k.followers,
        c.served + k.served AS served, c.exact, c.semantic, c.saved_tokens + k.saved_tokens AS saved_tokens
    FROM c, k
)"""

# The same of a statement that ended leaders, its own `i`, with one error; `f` is the shard.
FOLLOWERS_OF_ENDED = """
, d AS (
    INSERT INTO results (batch_id, seq, outcome, source, error_code, error_message,
        prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, duration_ms)
    SELECT i.batch_id, x.seq, 'failed', 'none', :code, :message, 0, 0, 0, 0, 0
    FROM i CROSS JOIN LATERAL (
        SELECT seq FROM followers WHERE batch_id = i.batch_id AND leader = i.seq OFFSET 0) AS x
    ON CONFLICT (batch_id, seq) DO NOTHING RETURNING 1
), k AS (SELECT count(*) AS n FROM d)"""


def insert_followers(session: Session, suspects: Iterable[tuple[int, int]], *, batch_id: UUID) -> int:
    """Let jobs of a validating batch follow: of each group of suspects, (group, seq), those whose bodies are equal.

    How many there are. The first leads the others. A job that has a result already neither leads nor follows.
    """
    session.execute(text("CREATE TEMP TABLE suspects (first int4, seq int4) ON COMMIT DROP"))
    with copy_cursor(session).copy("COPY suspects (first, seq) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["int4", "int4"])
        for pair in suspects:
            copy.write_row(pair)
    session.execute(text("ANALYZE suspects"))
    # Postgres knows nothing of rows that were just copied: by its estimates it would look through all for each.
    session.execute(text("SET LOCAL enable_nestloop = off"))
    count: int = session.execute(
        text("""
        WITH known AS MATERIALIZED (
            SELECT p.first, p.seq, sha256(convert_to(j.body, 'UTF8')) AS digest
            FROM suspects p JOIN jobs j ON j.batch_id = :batch AND j.seq = p.seq
            WHERE NOT EXISTS (SELECT FROM results r WHERE r.batch_id = :batch AND r.seq = p.seq)
        ), led AS (SELECT seq, min(seq) OVER (PARTITION BY first, digest) AS leader FROM known
        ), i AS (
            INSERT INTO followers (batch_id, seq, leader)
            SELECT :batch, seq, leader FROM led WHERE seq <> leader RETURNING 1)
        UPDATE batches SET followers = (SELECT count(*) FROM i) WHERE id = :batch RETURNING followers"""),
        {"batch": batch_id},
    ).scalar_one()
    session.execute(text("SET LOCAL enable_nestloop = on"))
    return count


def copy_followers(session: Session, earlier_id: UUID, *, batch_id: UUID) -> int:
    """Let the copies of an ended batch's failed jobs follow as these did, where the leader failed too: how many."""
    count: int = session.execute(
        text("""
        WITH copied AS (
            SELECT seq, CAST(row_number() OVER (ORDER BY seq) AS int4) - 1 AS new_seq
            FROM results WHERE batch_id = :earlier AND outcome = 'failed'
        ), i AS (
            INSERT INTO followers (batch_id, seq, leader)
            SELECT :batch, follower.new_seq, leader.new_seq FROM followers x
            JOIN copied follower ON follower.seq = x.seq JOIN copied leader ON leader.seq = x.leader
            WHERE x.batch_id = :earlier RETURNING 1)
        UPDATE batches SET followers = (SELECT count(*) FROM i) WHERE id = :batch RETURNING followers"""),
        {"earlier": earlier_id, "batch": batch_id},
    ).scalar_one()
    return count


def leaders_among(session: Session, batch_id: UUID, seqs: Sequence[int]) -> set[int]:
    """Those of these jobs that others follow."""
    return set(
        session.scalars(
            text("""
        SELECT u.seq FROM unnest(CAST(:seqs AS int4[])) AS u (seq) CROSS JOIN LATERAL (
            SELECT FROM followers WHERE batch_id = :batch AND leader = u.seq LIMIT 1) AS x"""),
            {"batch": batch_id, "seqs": list(seqs)},
        )
    )


def count_followers(session: Session, batch_id: UUID, leaders: Sequence[int]) -> dict[int, int]:
    """How many jobs follow each of these, of those that have some."""
    rows = session.execute(
        text("""
        SELECT u.seq, x.n FROM unnest(CAST(:seqs AS int4[])) AS u (seq) CROSS JOIN LATERAL (
            SELECT count(*) AS n FROM followers WHERE batch_id = :batch AND leader = u.seq) AS x WHERE x.n > 0"""),
        {"batch": batch_id, "seqs": list(leaders)},
    )
    return {seq: count for seq, count in rows}


def settings_of_followers(session: Session, batch_id: UUID, leaders: Sequence[int]) -> dict[int, list[str]]:
    """The `stoker` objects of the lines that follow these, by leader."""
    found: dict[int, list[str]] = {}
    rows = session.execute(
        text("""
        SELECT u.leader, j.stoker FROM unnest(CAST(:leaders AS int4[])) AS u (leader)
        CROSS JOIN LATERAL (SELECT seq FROM followers WHERE batch_id = :batch AND leader = u.leader OFFSET 0) AS x
        CROSS JOIN LATERAL (SELECT stoker FROM jobs WHERE batch_id = :batch AND seq = x.seq OFFSET 0) AS j
        WHERE j.stoker IS NOT NULL"""),
        {"batch": batch_id, "leaders": list(leaders)},
    )
    for leader, stoker in rows:
        found.setdefault(leader, []).append(stoker)
    return found


def release(session: Session, batch_id: UUID) -> None:
    """Let followers without a result whose leader has one be jobs by themselves: nobody would write them."""
    session.execute(
        text("""
        WITH gone AS (
            DELETE FROM followers x WHERE x.batch_id = :id
              AND EXISTS (SELECT FROM results r WHERE r.batch_id = :id AND r.seq = x.leader)
              AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = :id AND r.seq = x.seq) RETURNING 1)
        UPDATE batches SET followers = followers - (SELECT count(*) FROM gone) WHERE id = :id"""),
        {"id": batch_id},
    )
