"""SQL of what the dispatch leader states of live batches: how many there are, and how far those that run have come."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class RunningBatch:
    """A batch in progress. `remaining` of its jobs are to run; `unfinished` have no result, their followers included.

    `done` ran or were served. `is_running`: a worker has a shard of it. A batch without a window has no `time_left_s`;
    one that is paused goes on losing it.
    """

    id: UUID
    unfinished: int
    remaining: int
    done: int
    time_left_s: float | None
    window_s: float
    is_running: bool
    is_paused: bool = False


def running_batches(session: Session) -> list[RunningBatch]:
    """The batches in progress that are not being ended."""
    rows = session.execute(
        text("""
        SELECT b.id, b.total - coalesce(d.with_followers, 0), b.total - b.followers - coalesce(d.done, 0),
            coalesce(d.done, 0), CAST(extract(epoch FROM b.expires_at - clock_timestamp()) AS float8),
            coalesce(CAST(extract(epoch FROM b.expires_at - b.in_progress_at) AS float8), 0),
            EXISTS (SELECT FROM shards s WHERE s.batch_id = b.id AND s.state = 'running'),
            b.paused_reason IS NOT NULL
        FROM batches b CROSS JOIN LATERAL (
            SELECT CAST(sum(done) AS int8) AS done, CAST(sum(done + followers) AS int8) AS with_followers
            FROM shards WHERE batch_id = b.id) AS d
        WHERE b.state = 'in_progress' AND b.ending IS NULL""")
    )
    return [RunningBatch(*row) for row in rows]


def live_counts(session: Session) -> dict[str, tuple[int, int]]:
    """(batches, those of them that are paused) by state, of batches that have not ended."""
    rows = session.execute(
        text("""
        SELECT state, count(*), count(paused_reason) FROM batches
        WHERE state IN ('validating', 'in_progress', 'cancelling', 'finalizing') GROUP BY state""")
    )
    return {state: (count, paused) for state, count, paused in rows}
