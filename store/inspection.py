"""What a page shows of one batch: its jobs a page at a time, one job whole, failures by kind, its course over time.

A request must cost little however large the batch is: by the key (batch_id, seq), or by the shards that have what is
looked for. Nothing is read of a batch that is not the tenant's; these raise NotFound for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.names import batch_name
from models.states import Outcome, Source
from runtime.errors import NotFound

SCANNED_JOBS = 5_000  # lines in a row that are looked at before shards are; 5 to 15 ms
LOOKED_AT_JOBS = 20_000  # jobs of shards looked at in one statement; 30 to 60 ms
SEARCH_S = 1.0  # after that an answer may be short, and says where to go on
SEARCH_FOR_ONE_S = 5.0  # after that it may be empty
COUNTED_JOBS = 50_000  # jobs of shards with failures among which these are counted
BUCKETS = 60
BUCKETED_JOBS = 200_000
SAMPLED_SHARDS = 500
EXAMPLE_CHARACTERS = 2_000


class Wanted(StrEnum):
    """Jobs that are looked for: by their outcome, or that have no result yet."""

    SUCCEEDED = "succeeded"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class JobLine:
    """A job and, if it has a result, what it ended with."""

    seq: int
    custom_id: str
    outcome: Outcome | None
    source: Source | None
    status_code: int | None
    error_code: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    duration_ms: int | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobPage:
    """Jobs in input order. `next_seq`: where the next page begins, None if there is none; a page may be short."""

    jobs: list[JobLine]
    next_seq: int | None


@dataclass(frozen=True, slots=True)
class WholeJob:
    """A job with its request and its result; `body`, `settings`, `response` and `stoker` are JSON text.

    `leader` is the custom_id of the job whose result it takes or took.
    """

    seq: int
    custom_id: str
    body: str
    settings: str | None
    outcome: Outcome | None
    source: Source | None
    status_code: int | None
    response: str | None
    error_code: str | None
    error_message: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    duration_ms: int | None
    similarity: float | None
    entry: int | None
    namespace: int | None
    stoker: str | None
    ended_at: datetime | None
    leader: str | None


@dataclass(frozen=True, slots=True)
class FailureKind:
    """Failed jobs of one code: how many, and what the first of them said; `response` is JSON text, cut."""

    code: str
    count: int
    message: str | None
    response: str | None


@dataclass(frozen=True, slots=True)
class Failures:
    """Kinds, most frequent first. Not `complete`: failures are so scattered that only some of them were looked at."""

    kinds: list[FailureKind]
    complete: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """Jobs that ended within a stretch of time that ends at `at`."""

    at: float
    jobs: int
    failed: int


_JOBS_OF = """
SELECT u.seq, j.custom_id, r.outcome, r.source, r.status_code, r.error_code, r.prompt_tokens, r.completion_tokens,
    r.duration_ms, r.created_at
FROM unnest(CAST(:seqs AS int4[])) AS u (seq)
CROSS JOIN LATERAL (SELECT custom_id FROM jobs WHERE batch_id = :id AND seq = u.seq OFFSET 0) AS j
LEFT JOIN LATERAL (SELECT * FROM results WHERE batch_id = :id AND seq = u.seq OFFSET 0) AS r ON true
ORDER BY u.seq
"""
_SHARD_HAS = {
    Wanted.SUCCEEDED: "s.done + s.followers > s.failed + s.truncated + s.empty",
    Wanted.TRUNCATED: "s.truncated > 0",
    Wanted.EMPTY: "s.empty > 0",
    Wanted.FAILED: "s.failed > 0",
    Wanted.WAITING: "s.done < cardinality(s.seqs)",
}
_SCAN = """
SELECT seq FROM results
WHERE batch_id = :id AND seq >= :first AND seq < :end AND outcome = :wanted ORDER BY seq LIMIT :limit
"""
_SCAN_WAITING = """
SELECT g.seq FROM generate_series(CAST(:first AS int4), CAST(:end AS int4) - 1) AS g (seq)
LEFT JOIN LATERAL (SELECT seq FROM results WHERE batch_id = :id AND seq = g.seq OFFSET 0) AS r ON true
WHERE r.seq IS NULL ORDER BY g.seq LIMIT :limit
"""
_FOLLOWERS = "UNION ALL SELECT x.seq FROM led JOIN followers x ON x.batch_id = :id AND x.leader = led.seq"
_LOOK = """
WITH led AS (SELECT u.seq FROM shards s CROSS JOIN unnest(s.seqs) AS u (seq) WHERE s.batch_id = :id AND {has}),
looked_at AS MATERIALIZED (
    SELECT c.seq FROM (SELECT seq FROM led {followers}) AS c WHERE c.seq >= :first ORDER BY c.seq LIMIT :most)
SELECT count(*), max(l.seq), array_agg(l.seq ORDER BY l.seq) FILTER (WHERE coalesce(r.outcome, 'waiting') = :wanted)
FROM looked_at l
LEFT JOIN LATERAL (SELECT outcome FROM results WHERE batch_id = :id AND seq = l.seq OFFSET 0) AS r ON true
"""
_FAILURES = """
WITH looked_at AS MATERIALIZED (
    SELECT u.seq FROM (
        SELECT seqs, sum(cardinality(seqs)) OVER (ORDER BY id) AS so_far
        FROM shards WHERE batch_id = :id AND failed > 0) AS s
    CROSS JOIN unnest(s.seqs) AS u (seq) WHERE s.so_far - cardinality(s.seqs) < :most
), failed AS (
    SELECT l.seq, coalesce(r.error_code, 'http_' || r.status_code, 'unknown') AS code
    FROM looked_at l CROSS JOIN LATERAL (
        SELECT outcome, error_code, status_code FROM results WHERE batch_id = :id AND seq = l.seq OFFSET 0) AS r
    WHERE r.outcome = 'failed'
), kinds AS (
    SELECT f.code, min(f.seq) AS seq, CAST(count(*) + sum(x.followers) AS int8) AS count
    FROM failed f CROSS JOIN LATERAL (
        SELECT count(*) AS followers FROM followers WHERE batch_id = :id AND leader = f.seq OFFSET 0) AS x
    GROUP BY f.code)
SELECT k.code, k.count, left(r.error_message, :characters), left(r.response, :characters)
FROM kinds k CROSS JOIN LATERAL (SELECT * FROM results WHERE batch_id = :id AND seq = k.seq OFFSET 0) AS r
ORDER BY k.count DESC, k.code
"""


def jobs_page(
    session: Session, batch_id: UUID, *, tenant: str, first: int, limit: int, wanted: Wanted | None = None
) -> JobPage:
    """The next `limit` jobs from seq `first` on, or of those that are wanted."""
    total, followers = _sizes(session, batch_id, tenant=tenant)
    if wanted is None:
        found: list[int] = list(range(first, min(first + limit, total)))
        next_seq = found[-1] + 1 if found and found[-1] + 1 < total else None
    else:
        search = _Search(session, batch_id, wanted=wanted, total=total, has_followers=followers > 0)
        found, next_seq = search.find(first, limit)
    rows = session.execute(text(_JOBS_OF), {"id": batch_id, "seqs": found}) if found else ()
    return JobPage([_job_line(*row) for row in rows], next_seq)


def whole_job(session: Session, batch_id: UUID, seq: int, *, tenant: str) -> WholeJob:
    """One job with all that is known of it. Raises NotFound also for a line that the batch does not have."""
    total, _ = _sizes(session, batch_id, tenant=tenant)
    row = session.execute(
        text("""
        SELECT j.custom_id, j.body, j.stoker, r.outcome, r.source, r.status_code, r.response, r.error_code,
            r.error_message, r.prompt_tokens, r.completion_tokens, r.duration_ms, r.similarity,
            r.cache_entry_id, r.namespace_id, r.stoker, r.created_at, (
                SELECT l.custom_id FROM followers x CROSS JOIN LATERAL (
                    SELECT custom_id FROM jobs WHERE batch_id = :id AND seq = x.leader OFFSET 0) AS l
                WHERE x.batch_id = :id AND x.seq = :seq)
        FROM jobs j LEFT JOIN LATERAL (
            SELECT * FROM results WHERE batch_id = :id AND seq = :seq OFFSET 0) AS r ON true
        WHERE j.batch_id = :id AND j.seq = :seq"""),
        {"id": batch_id, "seq": seq},
    ).one_or_none()
    if row is None or seq >= total:
        raise NotFound(f"batch {batch_id} has no line {seq + 1}")
    custom_id, body, settings, outcome, source, *rest = row
    return WholeJob(
        seq, custom_id, body, settings, Outcome(outcome) if outcome else None, Source(source) if source else None, *rest
    )


def failures_of(session: Session, batch_id: UUID, *, tenant: str) -> Failures:
    """The failed jobs by kind, followers included. Looks only into shards that have some, oldest first."""
    _sizes(session, batch_id, tenant=tenant)
    failed: int = session.execute(
        text("SELECT CAST(coalesce(sum(failed), 0) AS int8) FROM shards WHERE batch_id = :id"), {"id": batch_id}
    ).scalar_one()
    if not failed:
        return Failures([], complete=True)
    rows = session.execute(
        text(_FAILURES), {"id": batch_id, "most": COUNTED_JOBS, "characters": EXAMPLE_CHARACTERS}
    ).all()
    return Failures([FailureKind(*row) for row in rows], complete=sum(row[1] for row in rows) >= failed)


def course_of(session: Session, batch_id: UUID, *, tenant: str) -> list[Bucket]:
    """Results over time, in equal stretches from the first to the last; none of a batch that is too large for it."""
    total, _ = _sizes(session, batch_id, tenant=tenant)
    if total > BUCKETED_JOBS:
        return []
    rows = session.execute(
        text("""
        WITH ended AS MATERIALIZED (
            SELECT CAST(extract(epoch FROM created_at) AS float8) AS at, outcome FROM results WHERE batch_id = :id
        ), span AS (SELECT min(at) AS began, max(at) AS ended FROM ended)
        SELECT CAST(least(floor((e.at - s.began) / nullif(s.ended - s.began, 0) * :buckets), :buckets - 1) AS int4),
            s.began, s.ended, count(*), count(*) FILTER (WHERE e.outcome = 'failed')
        FROM ended e CROSS JOIN span s GROUP BY 1, 2, 3"""),
        {"id": batch_id, "buckets": BUCKETS},
    ).all()
    if not rows:
        return []
    _, began, ended, *_ = rows[0]
    counts = {number or 0: (jobs, failed) for number, _, _, jobs, failed in rows}
    step_s = (ended - began) / BUCKETS
    return [
        Bucket(began + step_s * (number + 1), *counts.get(number, (0, 0))) for number in range(BUCKETS if step_s else 1)
    ]


def engines_seen(session: Session, batch_id: UUID, *, tenant: str) -> list[dict[str, Any]]:
    """The descriptions of engines that gave results, as one job of each of some shards shows: it may lack one."""
    _sizes(session, batch_id, tenant=tenant)
    return list(
        session.scalars(
            text("""
        WITH done AS (
            SELECT seqs[1] AS seq, row_number() OVER (ORDER BY id) AS place, count(*) OVER () AS shards
            FROM shards WHERE batch_id = :id AND done > 0
        ), sampled AS MATERIALIZED (SELECT seq FROM done WHERE place % (1 + shards / :most) = 0),
        seen AS MATERIALIZED (
            SELECT DISTINCT r.engine_id FROM sampled s CROSS JOIN LATERAL (
                SELECT engine_id FROM results WHERE batch_id = :id AND seq = s.seq OFFSET 0) AS r)
        SELECT e.description FROM engines e JOIN seen ON seen.engine_id = e.id ORDER BY e.id"""),
            {"id": batch_id, "most": SAMPLED_SHARDS},
        )
    )


class _Search:
    """Finds jobs in input order: first in the lines that follow, then in the shards that have such jobs."""

    def __init__(self, session: Session, batch_id: UUID, *, wanted: Wanted, total: int, has_followers: bool) -> None:
        self._session = session
        self._values = {"id": batch_id, "wanted": wanted.value}
        self._scan = text(_SCAN_WAITING if wanted is Wanted.WAITING else _SCAN)
        self._look = text(_LOOK.format(has=_SHARD_HAS[wanted], followers=_FOLLOWERS if has_followers else ""))
        self._total = total

    def find(self, first: int, limit: int) -> tuple[list[int], int | None]:
        """Up to `limit` seqs from `first` on, and where to go on. It may find fewer where they are very scattered."""
        began = time.monotonic()
        found: list[int] = []
        for seqs, next_seq in self._steps(first, limit + 1):
            found += seqs
            if len(found) > limit:
                return found[:limit], found[limit]
            if time.monotonic() - began > (SEARCH_S if found else SEARCH_FOR_ONE_S):
                return found, next_seq
        return found, None

    def _steps(self, first: int, limit: int) -> Iterator[tuple[Sequence[int], int]]:
        """(what was found, the seq after the last looked at), while there is anything to look at."""
        if first >= self._total:
            return
        end = min(first + SCANNED_JOBS, self._total)
        values = self._values | {"first": first, "end": end, "limit": limit}
        yield self._session.scalars(self._scan, values).all(), end
        # The best plan depends on how many shards there are to look into: a plan that is kept cannot know.
        self._session.execute(text("SET LOCAL plan_cache_mode = force_custom_plan"))
        while True:
            count, last, seqs = self._session.execute(
                self._look, self._values | {"first": end, "most": LOOKED_AT_JOBS}
            ).one()
            if not count:
                return
            end = last + 1
            yield seqs or (), end


def _sizes(session: Session, batch_id: UUID, *, tenant: str) -> tuple[int, int]:
    """(jobs, followers) of a batch; no jobs before it is whole. Raises NotFound if the tenant has none with this id."""
    row = session.execute(
        text("""
        SELECT CASE WHEN state = 'validating' THEN 0 ELSE total END, followers FROM batches
        WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL"""),
        {"id": batch_id, "tenant": tenant},
    ).one_or_none()
    if row is None:
        raise NotFound(f"no {batch_name(batch_id)}")
    return row[0], row[1]


def _job_line(seq: int, custom_id: str, outcome: str | None, source: str | None, *rest: Any) -> JobLine:
    return JobLine(seq, custom_id, Outcome(outcome) if outcome else None, Source(source) if source else None, *rest)
