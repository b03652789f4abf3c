"""SQL of the steps of jobs of several requests: what each of them was answered, until its job has a result.

A step is written under the fence, with what else its attempt has learned, and the first reply that was written stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.arrays import Int4s, Texts
from store.shards import Claim


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """One request of a job that was answered; `reply` is JSON."""

    seq: int
    step: str
    reply: str


def steps_of(session: Session, batch_id: UUID, seqs: Sequence[int]) -> dict[int, dict[str, str]]:
    """The replies of these jobs' finished steps, by seq and step."""
    found: dict[int, dict[str, str]] = {}
    rows = session.execute(
        text("""
        SELECT u.seq, x.step, x.reply FROM unnest(CAST(:seqs AS int4[])) AS u (seq) CROSS JOIN LATERAL (
            SELECT step, reply FROM job_steps WHERE batch_id = :batch AND seq = u.seq OFFSET 0) AS x"""),
        {"batch": batch_id, "seqs": Int4s(seqs)},
    )
    for seq, step, reply in rows:
        found.setdefault(seq, {})[step] = reply
    return found


def write_steps(session: Session, claim: Claim, steps: Sequence[FinishedStep], *, lease_s: float) -> bool:
    """Write finished steps under the fence; false if the fence is lost. What is there already stays.

    An attempt that wrote one has committed something, as if it were a result: its death is no crash. A job that kills
    its worker at one step gets no further by that: its next attempt finds the steps before it and writes none.
    """
    held = session.execute(
        text("""
        WITH f AS (
            SELECT id, batch_id FROM shards WHERE id = :shard_id AND fence = :fence AND state = 'running'
            FOR NO KEY UPDATE
        ), i AS (
            INSERT INTO job_steps (batch_id, seq, step, reply)
            SELECT f.batch_id, u.* FROM f, unnest(
                CAST(:seqs AS int4[]), CAST(:steps AS text[]), CAST(:replies AS text[])) AS u
            ON CONFLICT (batch_id, seq, step) DO NOTHING RETURNING 1
        )
        UPDATE shards s SET done_at_claim = CASE WHEN EXISTS (SELECT FROM i) THEN -1 ELSE s.done_at_claim END,
            lease_until = clock_timestamp() + make_interval(secs => :lease_s)
        FROM f WHERE s.id = f.id RETURNING 1"""),
        {
            "shard_id": claim.shard_id,
            "fence": claim.fence,
            "lease_s": lease_s,
            "seqs": Int4s(step.seq for step in steps),
            "steps": Texts(step.step for step in steps),
            "replies": Texts(step.reply for step in steps),
        },
    ).one_or_none()
    return held is not None


def delete_steps(session: Session, batch_id: UUID, seqs: Sequence[int]) -> None:
    """Delete the steps of jobs that have their results, in the transaction that wrote these."""
    session.execute(
        text("""
        DELETE FROM job_steps WHERE ctid = ANY(ARRAY(
            SELECT x.ctid FROM unnest(CAST(:seqs AS int4[])) AS u (seq) CROSS JOIN LATERAL (
                SELECT ctid FROM job_steps WHERE batch_id = :batch AND seq = u.seq OFFSET 0) AS x))"""),
        {"batch": batch_id, "seqs": Int4s(seqs)},
    )
