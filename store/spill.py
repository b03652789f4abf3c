"""SQL of spill-over: the batches that may send jobs to priced endpoints, and how many they may."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.money import PAID

_MAY_SPILL = f"""b.state = 'in_progress' AND b.ending IS NULL AND b.paused_reason IS NULL
    AND b.options ->> 'trust' = 'external' AND {PAID}"""


@dataclass(frozen=True, slots=True)
class Spilling:
    """A batch that may spill; `is_running`: a worker has a shard of it.

    `done_by_own`: by own endpoints and caches. `out` of its `remaining` jobs are on priced endpoints at this moment.
    """

    id: UUID
    remaining: int
    done_by_own: int
    out: int
    spill: int
    time_left_s: float
    window_s: float
    is_running: bool


def spilling_batches(session: Session) -> list[Spilling]:
    """The batches in progress whose prompts may leave own endpoints and that have money for it."""
    rows = session.execute(
        text(f"""
        SELECT b.id, b.total - b.followers - coalesce(d.done, 0), coalesce(d.done, 0) - coalesce(o.jobs, 0),
            coalesce(r.requests, 0), b.spill,
            CAST(extract(epoch FROM b.expires_at - clock_timestamp()) AS float8),
            CAST(extract(epoch FROM b.expires_at - b.in_progress_at) AS float8),
            EXISTS (SELECT FROM shards s WHERE s.batch_id = b.id AND s.state = 'running')
        FROM batches b
        CROSS JOIN LATERAL (SELECT CAST(sum(done) AS int8) AS done FROM shards WHERE batch_id = b.id) AS d
        CROSS JOIN LATERAL (
            SELECT CAST(sum(u.jobs) AS int8) AS jobs FROM usage u JOIN engines e ON e.id = u.engine_id
            WHERE u.batch_id = b.id AND e.description ->> 'trust' = 'external') AS o
        CROSS JOIN LATERAL (
            SELECT CAST(sum(of_shard.requests) AS int8) AS requests FROM (
                SELECT max(m.requests) AS requests FROM shards s JOIN money_reservations m ON m.shard_id = s.id
                WHERE s.batch_id = b.id AND s.state = 'running' GROUP BY s.id) AS of_shard) AS r
        WHERE {_MAY_SPILL}""")
    )
    return [Spilling(*row) for row in rows]


def set_spill(session: Session, batch: Spilling, jobs: int) -> None:
    """Let so many more of a batch's jobs begin on priced endpoints, unless some began since it was looked at."""
    session.execute(
        text("UPDATE batches SET spill = :jobs WHERE id = :batch AND spill = :seen"),
        {"batch": batch.id, "jobs": jobs, "seen": batch.spill},
    )
