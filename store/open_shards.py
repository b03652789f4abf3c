"""SQL of cutting a validating batch's shards again: what is to be run of the open ones, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.lines import BYTES_PER_TOKEN


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

    Their output tokens are their shard's, shared evenly: what each line wished for is not read again. Read by ranges
    and joined here: Postgres knows nothing of rows that were just copied, and joins them badly.
    """
    bounds = {
        "batch": batch_id,
        "low": min(min(shard.seqs) for shard in shards),
        "high": max(max(shard.seqs) for shard in shards),
    }
    within = "batch_id = :batch AND seq BETWEEN :low AND :high"
    rows = session.execute(text(f"SELECT seq, octet_length(body) FROM jobs WHERE {within}"), bounds)
    sizes: dict[int, int] = {seq: size for seq, size in rows}
    ended = set(session.scalars(text(f"SELECT seq FROM results WHERE {within}"), bounds))
    ended.update(session.scalars(text(f"SELECT seq FROM followers WHERE {within}"), bounds))
    jobs = []
    for shard in shards:
        prompts = sum(sizes[seq] // BYTES_PER_TOKEN for seq in shard.seqs)
        outputs = (shard.tokens - prompts) // len(shard.seqs)
        jobs += [
            CutJob(seq, sizes[seq] // BYTES_PER_TOKEN + outputs, sizes[seq]) for seq in shard.seqs if seq not in ended
        ]
    return jobs


def delete_open_shards(session: Session, batch_id: UUID, *, upto: int) -> None:
    """Delete what was cut again."""
    session.execute(
        text("DELETE FROM shards WHERE batch_id = :batch AND id <= :upto AND state = 'pending'"),
        {"batch": batch_id, "upto": upto},
    )
