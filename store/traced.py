"""What the span of an ended batch states."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class Totals:
    """An ended batch, without its tenant and its file's name. `outcomes`: jobs by what they ended with, if any did."""

    state: str
    endpoint: str
    created_at: datetime
    ended_at: datetime
    total: int
    prompt_tokens: int
    completion_tokens: int
    outcomes: dict[str, int]


def totals_of(session: Session, batch_id: UUID) -> Totals | None:
    """The batch's totals; None while it has not ended."""
    row = session.execute(
        text("""
        SELECT state, endpoint, created_at, ended_at, total, coalesce(sums, '{}') AS sums FROM batches
        WHERE id = :id AND ended_at IS NOT NULL"""),
        {"id": batch_id},
    ).one_or_none()
    if row is None:
        return None
    sums = {name: int(count) for name, count in row.sums.items()}
    outcomes = {name: sums[name] for name in ("failed", "truncated", "empty", "served") if sums.get(name)}
    return Totals(
        state=row.state,
        endpoint=row.endpoint,
        created_at=row.created_at,
        ended_at=row.ended_at,
        total=row.total,
        prompt_tokens=sums.get("prompt_tokens", 0),
        completion_tokens=sums.get("completion_tokens", 0),
        outcomes=outcomes,
    )
