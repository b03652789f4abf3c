"""The dispatch leader's statements: which shards go out next, and which hints may have been lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class Candidates:
    """A batch that may run: its shards to send next, in order, and how many of them are live already."""

    batch_id: UUID
    tenant: str
    live_shards: int
    shard_ids: tuple[int, ...]


def unclaimed_count(session: Session) -> int:
    """How many shards are dispatched and not yet claimed."""
    return int(session.execute(text("SELECT count(*) FROM shards WHERE state = 'dispatched'")).scalar_one())


def candidates(session: Session, *, limit: int) -> list[Candidates]:
    """Up to `limit` next shards of every batch that may run, the batch that must end first at the front.

    A batch's cursor keeps the scan of its pending shards short however many are done; shards that came
    back (they have a not_before) stand apart and go first when due.
    """
    rows = session.execute(
        text("""
        SELECT b.id, b.tenant,
            (SELECT count(*) FROM shards l WHERE l.state IN ('dispatched', 'running') AND l.batch_id = b.id),
            array_cat(
                ARRAY(SELECT s.id FROM shards s WHERE s.batch_id = b.id AND s.state = 'pending'
                      AND s.not_before <= clock_timestamp() ORDER BY s.id LIMIT :limit),
                ARRAY(SELECT s.id FROM shards s WHERE s.batch_id = b.id AND s.state = 'pending'
                      AND s.not_before IS NULL AND s.id > b.cursor ORDER BY s.id LIMIT :limit))
        FROM batches b
        WHERE b.state = 'in_progress' AND b.ending IS NULL AND b.paused_reason IS NULL
        ORDER BY b.expires_at, b.id"""),
        {"limit": limit},
    ).all()
    return [
        Candidates(batch_id=batch_id, tenant=tenant, live_shards=live, shard_ids=tuple(ids))
        for batch_id, tenant, live, ids in rows
        if ids or live
    ]


def mark_dispatched(session: Session, shard_ids: Sequence[int]) -> list[tuple[int, UUID]]:
    """Turn pending shards to dispatched: (shard, batch) of each that was pending.

    A batch's cursor moves to the last of its shards that was sent for the first time. Shards that came back
    do not move it: halves have the highest ids, and would hide all that was never sent.
    """
    rows = session.execute(
        text("""
        UPDATE shards SET state = 'dispatched', dispatched_at = clock_timestamp()
        WHERE id = ANY(CAST(:ids AS int8[])) AND state = 'pending' RETURNING id, batch_id, not_before IS NULL"""),
        {"ids": list(shard_ids)},
    ).all()
    last: dict[UUID, int] = {}
    for shard_id, batch_id, is_first in rows:
        if is_first:
            last[batch_id] = max(last.get(batch_id, 0), shard_id)
    if last:
        session.execute(
            text("UPDATE batches SET cursor = greatest(cursor, :last) WHERE id = :id"),
            [{"id": batch_id, "last": shard_id} for batch_id, shard_id in last.items()],
        )
    return [(shard_id, batch_id) for shard_id, batch_id, _ in rows]


def stale_dispatched(session: Session, *, older_than_s: float) -> list[tuple[int, UUID]]:
    """Shards dispatched longer ago than this and still unclaimed: their hints may be lost."""
    rows = session.execute(
        text("""
        SELECT id, batch_id FROM shards WHERE state = 'dispatched'
          AND dispatched_at < clock_timestamp() - make_interval(secs => :age) ORDER BY id LIMIT 500"""),
        {"age": older_than_s},
    ).all()
    return [(shard_id, batch_id) for shard_id, batch_id in rows]


def touch_dispatched(session: Session, shard_ids: Sequence[int]) -> None:
    """Note that the hints of these shards were sent again; nothing else about them changes."""
    session.execute(
        text("""
        UPDATE shards SET dispatched_at = clock_timestamp()
        WHERE id = ANY(CAST(:ids AS int8[])) AND state = 'dispatched'"""),
        {"ids": list(shard_ids)},
    )
