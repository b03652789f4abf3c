"""SQL of cutting a validating batch's shards again: what is to be run of the open ones, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.lines import BYTES_PER_TOKEN
from store.arrays import Int4s


@dataclass(frozen=True, slots=True)
class CutJob:
    """What cutting shards asks of a job; `tokens` is an estimate, prompt and most output."""

    seq: int
    tokens: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard that is to be cut again."""

    id: int
    seqs: list[int]
    tokens: int


def newest_shard(session: Session, batch_id: UUID) -> int:
    """The highest id of the batch's shards, 0 if it has none."""
    found: int = session.execute(
        text("SELECT coalesce(max(id), 0) FROM shards WHERE batch_id = :batch"), {"batch": batch_id}
    ).scalar_one()
    return found


def open_shards(session: Session, batch_id: UUID, *, after: int, upto: int, limit: int) -> list[OpenShard]:
    """The next open shards with ids in (after, upto], in their order."""
    rows = session.execute(
        text("""
        SELECT id, seqs, tokens FROM shards WHERE batch_id = :batch AND id > :after AND id <= :upto
          AND state = 'pending' ORDER BY batch_id, id LIMIT :limit"""),
        {"batch": batch_id, "after": after, "upto": upto, "limit": limit},
    )
    return [OpenShard(*row) for row in rows]


def jobs_to_run(session: Session, batch_id: UUID, shards: Sequence[OpenShard]) -> list[CutJob]:
    """The jobs of these shards that have no result and do not follow, in their order.

    Their output tokens are their shard's, shared evenly: what each line wished for is not read again. An ordered
    shard's jobs may lie anywhere in a window of the file: each is looked up by its whole key, as in store/shards.py.
    """
    rows = session.execute(
        text("""
        SELECT octet_length(j.body), r.ended IS NULL AND f.follows IS NULL
        FROM unnest(CAST(:seqs AS int4[])) WITH ORDINALITY AS u (seq, place)
        CROSS JOIN LATERAL (SELECT body FROM jobs WHERE batch_id = :batch AND seq = u.seq OFFSET 0) AS j
        LEFT JOIN LATERAL (
            SELECT true AS ended FROM results WHERE batch_id = :batch AND seq = u.seq OFFSET 0) AS r ON true
        LEFT JOIN LATERAL (
            SELECT true AS follows FROM followers WHERE batch_id = :batch AND seq = u.seq OFFSET 0) AS f ON true
        ORDER BY u.place"""),
        {"batch": batch_id, "seqs": Int4s(seq for shard in shards for seq in shard.seqs)},
    ).all()
    jobs: list[CutJob] = []
    start = 0
    for shard in shards:
        found = rows[start : start + len(shard.seqs)]
        start += len(found)
        outputs = (shard.tokens - sum(size // BYTES_PER_TOKEN for size, _ in found)) // len(found)
        jobs += [
            CutJob(seq, size // BYTES_PER_TOKEN + outputs, size)
            for seq, (size, is_to_run) in zip(shard.seqs, found, strict=True)
            if is_to_run
        ]
    return jobs


def delete_open_shards(session: Session, batch_id: UUID, *, upto: int) -> None:
    """Delete what was cut again."""
    session.execute(
        text("DELETE FROM shards WHERE batch_id = :batch AND id <= :upto AND state = 'pending'"),
        {"batch": batch_id, "upto": upto},
    )
