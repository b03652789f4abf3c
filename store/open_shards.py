"""SQL of cutting a validating batch's shards again: what is to be run of the open ones, and their end."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class CutJob:
    """What cutting shards asks of a job; `tokens` is an estimate, prompt and most output."""

    seq: int
    tokens: int
    size_bytes: int


def newest_shard(session: Session, batch_id: UUID) -> int:
    """The highest id of the batch's shards, 0 if it has none."""
    found: int = session.execute(
        text("SELECT coalesce(max(id), 0) FROM shards WHERE batch_id = :batch"), {"batch": batch_id}
    ).scalar_one()
    return found


def shards_page(session: Session, batch_id: UUID, *, after: int, upto: int, shards: int) -> int | None:
    """The last of the next shards after `after`, none beyond `upto`; None if there is none left."""
    last: int | None = session.execute(
        text("""
        SELECT max(id) FROM (SELECT id FROM shards WHERE batch_id = :batch AND id > :after AND id <= :upto
            AND state = 'pending' ORDER BY batch_id, id LIMIT :shards) AS page"""),
        {"batch": batch_id, "after": after, "upto": upto, "shards": shards},
    ).scalar_one()
    return last


def jobs_to_run(session: Session, batch_id: UUID, *, after: int, upto: int) -> list[CutJob]:
    """The jobs of the open shards (after, upto] that have no result and do not follow, in their order.

    Their output tokens are their shard's, shared evenly: what each line wished for is not read again.
    """
    rows = session.execute(
        text("""
        SELECT seq, CAST(size / 4 + outputs / jobs AS int8), size FROM (
            SELECT s.id, u.seq, u.place, octet_length(j.body) AS size, count(*) OVER shard AS jobs,
                s.tokens - sum(octet_length(j.body) / 4) OVER shard AS outputs
            FROM shards s CROSS JOIN LATERAL unnest(s.seqs) WITH ORDINALITY AS u (seq, place)
            JOIN jobs j ON j.batch_id = :batch AND j.seq = u.seq
            WHERE s.batch_id = :batch AND s.id > :after AND s.id <= :upto AND s.state = 'pending'
            WINDOW shard AS (PARTITION BY s.id)) AS all_jobs
        WHERE NOT EXISTS (SELECT FROM results r WHERE r.batch_id = :batch AND r.seq = all_jobs.seq)
          AND NOT EXISTS (SELECT FROM followers x WHERE x.batch_id = :batch AND x.seq = all_jobs.seq)
        ORDER BY id, place"""),
        {"batch": batch_id, "after": after, "upto": upto},
    )
    return [CutJob(*row) for row in rows]


def delete_open_shards(session: Session, batch_id: UUID, *, upto: int) -> None:
    """Delete what was cut again."""
    session.execute(
        text("DELETE FROM shards WHERE batch_id = :batch AND id <= :upto AND state = 'pending'"),
        {"batch": batch_id, "upto": upto},
    )
