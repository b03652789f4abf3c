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
    """One request of a job that was answered, with so many tokens; `reply` is JSON."""

    seq: int
    step: str
    reply: str
    tokens: int = 0


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
    """Write finished steps under the fence; false if the fence is lost. What is there already stays."""
    return charge_steps(session, claim, steps, lease_s=lease_s) is not None


def charge_steps(session: Session, claim: Claim, steps: Sequence[FinishedStep], *, lease_s: float) -> int | None:
    """Write finished steps under the fence: the tokens that a budget is to be charged for those that were not there.

    None if the fence is lost. Of a claim without budgets nothing is charged.

    An attempt that wrote one has committed something, as if it were a result: its death is no crash. A job that kills
    its worker at one step gets no further by that: its next attempt finds the steps before it and writes none.
    """
    charged: int | None = session.execute(
        text("""
        WITH f AS (
            SELECT id, batch_id FROM shards WHERE id = :shard_id AND fence = :fence AND state = 'running'
            FOR NO KEY UPDATE
        ), i AS (
            INSERT INTO job_steps (batch_id, seq, step, reply, charged)
            SELECT f.batch_id, u.* FROM f, unnest(CAST(:seqs AS int4[]), CAST(:steps AS text[]),
                CAST(:replies AS text[]), CAST(:tokens AS int4[])) AS u
            ON CONFLICT (batch_id, seq, step) DO NOTHING RETURNING charged
        )
        UPDATE shards s SET done_at_claim = CASE WHEN EXISTS (SELECT FROM i) THEN -1 ELSE s.done_at_claim END,
            lease_until = clock_timestamp() + make_interval(secs => :lease_s)
        FROM f WHERE s.id = f.id RETURNING (SELECT CAST(coalesce(sum(charged), 0) AS int8) FROM i)"""),
        {
            "shard_id": claim.shard_id,
            "fence": claim.fence,
            "lease_s": lease_s,
            "seqs": Int4s(step.seq for step in steps),
            "steps": Texts(step.step for step in steps),
            "replies": Texts(step.reply for step in steps),
            "tokens": Int4s(step.tokens if claim.budgeted else 0 for step in steps),
        },
    ).scalar_one_or_none()
    return charged


def delete_steps(session: Session, batch_id: UUID, seqs: Sequence[int]) -> dict[int, int]:
    """Delete the steps of jobs that have their results, in the transaction that wrote these.

    What budgets were charged for them, by seq.
    """
    charged: dict[int, int] = {}
    rows = session.execute(
        text("""
        DELETE FROM job_steps WHERE ctid = ANY(ARRAY(
            SELECT x.ctid FROM unnest(CAST(:seqs AS int4[])) AS u (seq) CROSS JOIN LATERAL (
                SELECT ctid FROM job_steps WHERE batch_id = :batch AND seq = u.seq OFFSET 0) AS x))
        RETURNING seq, charged"""),
        {"batch": batch_id, "seqs": Int4s(seqs)},
    )
    for seq, tokens in rows:
        charged[seq] = charged.get(seq, 0) + tokens
    return charged
