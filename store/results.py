"""Reading results in input order, a page at a time, while a batch runs or after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import Outcome
from store.database import Database

PAGE_ROWS = 2_000


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One finished job as the result file shows it; `response` is JSON text."""

    seq: int
    custom_id: str
    outcome: Outcome
    source: str
    status_code: int | None
    response: str | None
    error_code: str | None
    error_message: str | None


def result_pages(database: Database, batch_id: UUID, *, after_seq: int = -1) -> Iterator[list[ResultRow]]:
    """Finished jobs with seq > after_seq in input order, in pages; each page is a short transaction of its own."""
    while True:
        with database.transaction() as session:
            page = _page(session, batch_id, after_seq=after_seq)
        if not page:
            return
        yield page
        after_seq = page[-1].seq


def engines_of(session: Session, batch_id: UUID) -> list[dict[str, Any]]:
    """The description of every engine that gave a result of this batch."""
    return list(
        session.scalars(
            text("""
        SELECT e.description FROM engines e WHERE e.id IN (
            SELECT DISTINCT engine_id FROM results WHERE batch_id = :id) ORDER BY e.id"""),
            {"id": batch_id},
        )
    )


def _page(session: Session, batch_id: UUID, *, after_seq: int) -> list[ResultRow]:
    rows = session.execute(
        text("""
        SELECT r.seq, j.custom_id, r.outcome, r.source, r.status_code, r.response, r.error_code, r.error_message
        FROM results r JOIN jobs j ON j.batch_id = r.batch_id AND j.seq = r.seq
        WHERE r.batch_id = :id AND r.seq > :after ORDER BY r.seq LIMIT :limit"""),
        {"id": batch_id, "after": after_seq, "limit": PAGE_ROWS},
    )
    return [ResultRow(seq, custom_id, Outcome(outcome), *rest) for seq, custom_id, outcome, *rest in rows]
