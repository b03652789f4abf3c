"""Reading results in input order, a page at a time, while a batch runs or after."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Uuid, bindparam, text
from sqlalchemy.orm import Session

from models.states import Outcome, Source
from store.database import Database

PAGE_ROWS = 2_000
GAP_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One finished job as the result file shows it; `response` is JSON text, `leader` the custom_id that it follows.

    `stoker` is a JSON object whose members belong into the line's. `cost` is in nanos of `currency`, where `endpoint`,
    the name of the one that answered, bills tokens; a worker's own engine has no name.
    """

    seq: int
    custom_id: str
    outcome: Outcome
    source: str
    status_code: int | None
    response: str | None
    error_code: str | None
    error_message: str | None
    entry: int | None = None
    similarity: float | None = None
    namespace: int | None = None
    stoker: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    duration_ms: int = 0
    cost: int | None = None
    engine_id: int | None = None
    leader: str | None = None
    endpoint: str | None = None
    currency: str = ""


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A job that ended as poison_job, and why."""

    batch_id: UUID
    seq: int
    custom_id: str
    message: str
    at: datetime


@dataclass(frozen=True, slots=True)
class WaitingJobs:
    """Jobs of a batch that wait for another try; `tries` is the most that one of them has had.

    `last_error` is that of the job which waits longest from now; `next_in_s` is negative when one is due.
    """

    jobs: int
    tries: int
    next_at: datetime
    next_in_s: float
    last_error: str


def result_pages(database: Database, batch_id: UUID, *, after_seq: int = -1) -> Iterator[list[ResultRow]]:
    """Finished jobs with seq > after_seq in input order; each page is a short transaction of its own.

    A page is what PAGE_ROWS lines of the input have by now: it is empty when none of them has finished.
    """
    with database.transaction() as session:
        total = session.scalar(text("SELECT total FROM batches WHERE id = :id"), {"id": batch_id}) or 0
    for first in range(after_seq + 1, total, PAGE_ROWS):
        with database.transaction() as session:
            page = _page(session, batch_id, first=first)
        yield page


def job_pages(database: Database, batch_id: UUID) -> Iterator[list[tuple[str, str, str | None]]]:
    """(custom_id, body, stoker) of all jobs in input order; each page is a short transaction of its own."""
    next_seq = 0
    while True:
        with database.transaction() as session:
            rows = session.execute(
                text("""
                SELECT custom_id, body, stoker FROM jobs
                WHERE batch_id = :id AND seq >= :first AND seq < :end ORDER BY seq"""),
                {"id": batch_id, "first": next_seq, "end": next_seq + PAGE_ROWS},
            ).all()
        if not rows:
            return
        yield [(custom_id, body, stoker) for custom_id, body, stoker in rows]
        next_seq += PAGE_ROWS


def first_unfinished(session: Session, batch_id: UUID, *, first: int, total: int) -> int:
    """The first seq from `first` on without a result; `total` if there is none. Reads no more than it must."""
    while first < total:
        end = min(first + GAP_ROWS, total)
        finished = session.scalar(
            text("SELECT count(*) FROM results WHERE batch_id = :id AND seq >= :first AND seq < :end"),
            {"id": batch_id, "first": first, "end": end},
        )
        if finished != end - first:
            missing: int = session.execute(
                text("""
                SELECT g.seq FROM generate_series(CAST(:first AS int4), CAST(:last AS int4)) AS g (seq)
                WHERE NOT EXISTS (SELECT FROM results WHERE batch_id = :id AND seq = g.seq)
                ORDER BY g.seq LIMIT 1"""),
                {"id": batch_id, "first": first, "last": end - 1},
            ).scalar_one()
            return missing
        first = end
    return total


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


def find_stoker(session: Session, batch_id: UUID, seq: int, *, tenant: str) -> str | None:
    """What a job's result has for its line's `stoker`; None also for a job that is not there, or not this tenant's."""
    found: str | None = session.execute(
        text("""
        SELECT r.stoker FROM batches b JOIN results r ON r.batch_id = b.id
        WHERE b.id = :batch AND b.tenant = :tenant AND b.deleted_at IS NULL
          AND r.batch_id = :batch AND r.seq = :seq"""),
        {"batch": batch_id, "seq": seq, "tenant": tenant},
    ).scalar_one_or_none()
    return found


def dead_jobs(session: Session, *, tenant: str, batch_id: UUID | None, limit: int) -> list[DeadJob]:
    """The jobs that ended as poison_job, with their followers, of one batch or of all of the tenant's, newest first.

    Looks only into shards that have failed jobs: results have no index on their error.
    """
    rows = session.execute(
        text("""
        WITH dead AS (
            SELECT r.batch_id, r.seq, r.error_message, r.created_at
            FROM batches b JOIN shards s ON s.batch_id = b.id AND s.failed > 0
            CROSS JOIN unnest(s.seqs) AS u (seq) CROSS JOIN LATERAL (
                SELECT * FROM results
                WHERE batch_id = b.id AND seq = u.seq AND error_code = 'poison_job' OFFSET 0) AS r
            WHERE b.tenant = :tenant AND b.deleted_at IS NULL AND b.id = coalesce(:batch_id, b.id)
        ), with_followers AS (
            SELECT * FROM dead UNION ALL
            SELECT d.batch_id, x.seq, d.error_message, d.created_at FROM dead d CROSS JOIN LATERAL (
                SELECT seq FROM followers WHERE batch_id = d.batch_id AND leader = d.seq OFFSET 0) AS x
            ORDER BY created_at DESC, batch_id, seq LIMIT :limit)
        SELECT d.batch_id, d.seq, j.custom_id, d.error_message, d.created_at FROM with_followers d CROSS JOIN LATERAL (
            SELECT custom_id FROM jobs WHERE batch_id = d.batch_id AND seq = d.seq OFFSET 0) AS j
        ORDER BY d.created_at DESC, d.batch_id, d.seq""").bindparams(bindparam("batch_id", type_=Uuid())),
        {"tenant": tenant, "batch_id": batch_id, "limit": limit},
    )
    return [DeadJob(identifier, seq, custom_id, message or "", at) for identifier, seq, custom_id, message, at in rows]


def waiting_jobs(session: Session, batch_id: UUID) -> WaitingJobs | None:
    """The batch's jobs that failed transiently and have no result yet; None if there are none."""
    row = session.execute(
        text("""
        SELECT count(*), max(t.tries), min(t.not_before),
            CAST(extract(epoch FROM min(t.not_before) - clock_timestamp()) AS float8),
            (array_agg(t.last_error ORDER BY t.not_before DESC))[1]
        FROM job_tries t WHERE t.batch_id = :id AND t.tries > 0
          AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = t.batch_id AND r.seq = t.seq)"""),
        {"id": batch_id},
    ).one()
    return WaitingJobs(*row) if row[0] else None


def _page(session: Session, batch_id: UUID, *, first: int) -> list[ResultRow]:
    rows = session.execute(
        text("""
        SELECT r.seq, j.custom_id, r.outcome, r.source, r.status_code, r.response, r.error_code, r.error_message,
            r.cache_entry_id, r.similarity, r.namespace_id, r.stoker, r.prompt_tokens, r.completion_tokens,
            r.duration_ms, r.cost, r.engine_id
        FROM results r CROSS JOIN LATERAL (
            SELECT custom_id FROM jobs WHERE batch_id = :id AND seq = r.seq OFFSET 0) AS j
        WHERE r.batch_id = :id AND r.seq >= :first AND r.seq < :end ORDER BY r.seq"""),
        {"id": batch_id, "first": first, "end": first + PAGE_ROWS},
    )
    page = [ResultRow(seq, custom_id, Outcome(outcome), *rest) for seq, custom_id, outcome, *rest in rows]
    if followers := [row.seq for row in page if row.source == Source.DUPLICATE]:
        leaders = _leaders(session, batch_id, followers)
        page = [replace(row, leader=leaders.get(row.seq)) for row in page]
    engines = {row.engine_id for row in page if row.engine_id is not None}
    if names := _endpoints(session, engines) if engines else {}:
        page = [_named(row, names) for row in page]
    return page


def _endpoints(session: Session, engines: Collection[int]) -> dict[int | None, tuple[str, str]]:
    """(name, currency) of those of the engines that are registered endpoints."""
    rows = session.execute(
        text("""
        SELECT id, description ->> 'name', coalesce(description ->> 'currency', 'USD') FROM engines
        WHERE id = ANY(CAST(:ids AS int4[])) AND description ->> 'kind' = 'endpoint'"""),
        {"ids": sorted(engines)},
    )
    return {identifier: (name, currency) for identifier, name, currency in rows}


def _named(row: ResultRow, names: Mapping[int | None, tuple[str, str]]) -> ResultRow:
    if row.source != Source.ENGINE or row.engine_id not in names:
        return row
    name, currency = names[row.engine_id]
    return replace(row, endpoint=name, currency=currency)


def _leaders(session: Session, batch_id: UUID, seqs: list[int]) -> dict[int, str]:
    """The custom_ids of those whom these jobs follow."""
    rows = session.execute(
        text("""
        SELECT u.seq, j.custom_id FROM unnest(CAST(:seqs AS int4[])) AS u (seq)
        CROSS JOIN LATERAL (SELECT leader FROM followers WHERE batch_id = :id AND seq = u.seq OFFSET 0) AS x
        CROSS JOIN LATERAL (SELECT custom_id FROM jobs WHERE batch_id = :id AND seq = x.leader OFFSET 0) AS j"""),
        {"id": batch_id, "seqs": seqs},
    )
    return {seq: custom_id for seq, custom_id in rows}
