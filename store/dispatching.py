"""The dispatch leader's statements: which shards go out next, and which hints may have been lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import Priority


@dataclass(frozen=True, slots=True)
class Candidates:
    """A batch that may run: what it has out, and its shards to send next, in order, as (id, estimated tokens)."""

    batch_id: UUID
    tenant: str
    priority: Priority
    weight: float
    running: int
    unclaimed: tuple[int, ...]
    shards: tuple[tuple[int, int], ...]


def unclaimed_count(session: Session) -> int:
    """How many shards are dispatched and not yet claimed."""
    return int(session.execute(text("SELECT count(*) FROM shards WHERE state = 'dispatched'")).scalar_one())


def candidates(session: Session, *, limit: int) -> list[Candidates]:
    """Up to `limit` next shards of every batch that may run, the batch that must end first at the front.

    None of one whose budget is all reserved for now.

    A batch's cursor keeps the scan of its pending shards short however many are done; shards that came
    back (they have a not_before) stand apart and go first when due. Each ORDER BY is that of a partial index:
    by the id alone Postgres would walk the primary key, past all that is done.
    """
    rows = session.execute(
        text("""
        WITH live AS (
            SELECT batch_id, count(*) FILTER (WHERE state = 'running') AS running,
                coalesce(array_agg(id) FILTER (WHERE state = 'dispatched'), '{}') AS unclaimed
            FROM shards WHERE state IN ('dispatched', 'running') GROUP BY batch_id
        ), waits AS MATERIALIZED (SELECT key_id, batch_id FROM budgets WHERE waits_until > clock_timestamp())
        SELECT b.id, b.tenant, b.priority, b.weight, coalesce(l.running, 0), coalesce(l.unclaimed, '{}'),
            coalesce(p.ids, '{}'), coalesce(p.tokens, '{}')
        FROM batches b LEFT JOIN live l ON l.batch_id = b.id
        CROSS JOIN LATERAL (
            SELECT array_agg(n.id) AS ids, array_agg(n.tokens) AS tokens FROM (
                (SELECT s.id, s.tokens FROM shards s WHERE s.batch_id = b.id AND s.state = 'pending'
                    AND s.not_before <= clock_timestamp() ORDER BY s.not_before LIMIT :limit)
                UNION ALL
                (SELECT s.id, s.tokens FROM shards s WHERE s.batch_id = b.id AND s.state = 'pending'
                    AND s.not_before IS NULL AND s.id > b.cursor ORDER BY s.batch_id, s.id LIMIT :limit)) AS n
            WHERE NOT EXISTS (SELECT FROM waits w WHERE w.batch_id = b.id OR w.key_id = b.key_id)) AS p
        WHERE b.state = 'in_progress' AND b.ending IS NULL AND b.paused_reason IS NULL
          AND (p.ids IS NOT NULL OR l.batch_id IS NOT NULL)
        ORDER BY b.expires_at, b.id"""),
        {"limit": limit},
    ).all()
    return [
        Candidates(
            batch_id=batch_id,
            tenant=tenant,
            priority=Priority(priority),
            weight=weight,
            running=running,
            unclaimed=tuple(unclaimed),
            shards=tuple(zip(ids, tokens, strict=True)),
        )
        for batch_id, tenant, priority, weight, running, unclaimed, ids, tokens in rows
    ]


def mark_dispatched(session: Session, shard_ids: Sequence[int]) -> list[tuple[int, UUID]]:
    """Turn pending shards to dispatched, to be claimed in this order: (shard, batch) of each that was pending.

    A batch's cursor moves to the last of its shards that was sent for the first time. Shards that came back
    do not move it: halves have the highest ids, and would hide all that was never sent.
    """
    rows = session.execute(
        text("""
        UPDATE shards SET state = 'dispatched',
            dispatched_at = statement_timestamp() + chosen.place * interval '1 microsecond'
        FROM unnest(CAST(:ids AS int8[])) WITH ORDINALITY AS chosen (id, place)
        WHERE shards.id = chosen.id AND state = 'pending'
        RETURNING shards.id, batch_id, not_before IS NULL"""),
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


def recall(session: Session, shard_ids: Sequence[int]) -> int:
    """Turn dispatched shards that nobody has claimed back to pending, due at once: how many they were."""
    rows = session.execute(
        text("""
        UPDATE shards SET state = 'pending', not_before = clock_timestamp() WHERE id IN (
            SELECT id FROM shards WHERE id = ANY(CAST(:ids AS int8[])) AND state = 'dispatched'
            FOR UPDATE SKIP LOCKED) AND state = 'dispatched' RETURNING 1"""),
        {"ids": list(shard_ids)},
    )
    return len(rows.all())


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
