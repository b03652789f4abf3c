"""Batches: reading them, their progress, and their transitions outside the shard protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, and_, case, or_, select, text, update
from sqlalchemy.orm import Session

from models.names import batch_name
from models.rows import Batch
from models.states import TERMINAL, BatchState, Ending, Priority
from runtime.errors import NotFound
from store.deliveries import announce_end
from store.files import add_results
from store.followers import FOLLOWERS_OF_ENDED, release
from store.namespaces import give_up_lookups
from store.notifications import VALIDATE_CHANNEL, wake, wake_dispatch
from store.usage import fold_usage

SCREENED_JOBS = 200
SCREENED_FAILURES = 60  # over 30% of the first 200


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """A batch and the sums of its shards' counters; tokens are as the endpoints counted them.

    `followers` are those of the jobs that take the results of equal ones; they count as done when these do. `request`
    is the create body of a batch that the gateway began, `problems` why its file was refused.
    """

    id: UUID
    state: BatchState
    ending: Ending | None
    priority: Priority
    paused_reason: str | None
    endpoint: str
    input_name: str
    options: dict[str, Any]
    max_output_tokens: int | None
    created_at: datetime
    in_progress_at: datetime | None
    expires_at: datetime | None
    cancelling_at: datetime | None
    finalizing_at: datetime | None
    ended_at: datetime | None
    input_file_id: str | None
    request: dict[str, Any] | None
    problems: list[dict[str, Any]] | None
    total: int
    done: int
    failed: int
    truncated: int
    empty: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    served: int
    saved_tokens: int
    unlooked: int
    running_shards: int
    weight: float
    skipped: int
    retry_of: UUID | None
    followers: int
    cost: int
    """What priced endpoints asked so far, in nanos."""
    currency: str | None

    @property
    def succeeded(self) -> int:
        """Jobs with a whole answer."""
        return self.done - self.failed - self.truncated - self.empty

    @property
    def is_ended(self) -> bool:
        """Whether the batch is in a terminal state."""
        return self.state in TERMINAL


# Not before it is whole, unless its creation was answered, nor past its retention.
_VISIBLE = "(state <> 'validating' OR input_file_id IS NOT NULL) AND deleted_at IS NULL"
_COUNTERS = (
    "failed",
    "truncated",
    "empty",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "served",
    "saved_tokens",
    "unlooked",
)
_SUMS = (("done", "s.done + s.followers"), *((name, f"s.{name}") for name in _COUNTERS))
# Of a batch that has ended the sums are kept: listings ask for them every second, and a large one has 15,000 shards.
_PROGRESS = f"""
SELECT b.id, b.state, b.ending, b.priority, b.paused_reason, b.endpoint, b.input_name, b.options, b.max_output_tokens,
    b.created_at, b.in_progress_at, b.expires_at, b.cancelling_at, b.finalizing_at, b.ended_at, b.input_file_id,
    b.request, b.problems, b.total,
    {", ".join(f"coalesce(CAST(b.sums ->> '{name}' AS int8), CAST(sum({sum_}) AS int8), 0)" for name, sum_ in _SUMS)},
    count(*) FILTER (WHERE s.state = 'running'), b.weight, b.skipped, b.retry_of, b.followers, (
        SELECT json_build_array(sum(u.cost), coalesce(max(e.description ->> 'currency'), 'USD'))
        FROM usage u JOIN engines e ON e.id = u.engine_id WHERE u.batch_id = b.id AND u.cost > 0)
FROM batches b LEFT JOIN shards s ON s.batch_id = b.id AND b.sums IS NULL
WHERE b.tenant = :tenant AND b.deleted_at IS NULL AND {{condition}}
GROUP BY b.id ORDER BY b.id DESC LIMIT :limit
"""


def batch_progress(session: Session, batch_id: UUID, *, tenant: str) -> BatchProgress:
    """One batch. Raises NotFound if the tenant has none with this id."""
    row = session.execute(
        text(_PROGRESS.format(condition="b.id = :batch_id")), {"tenant": tenant, "batch_id": batch_id, "limit": 1}
    ).one_or_none()
    if row is None:
        raise NotFound(f"no {batch_name(batch_id)}")
    return _progress(row)


def progress_of_batches(session: Session, batch_ids: Sequence[UUID], *, tenant: str) -> dict[UUID, BatchProgress]:
    """Those of these batches that the tenant has."""
    ids = list(batch_ids)
    condition = "b.id = ANY(:ids)"
    rows = session.execute(
        text(_PROGRESS.format(condition=condition)), {"tenant": tenant, "ids": ids, "limit": len(ids)}
    )
    return {batch.id: batch for batch in map(_progress, rows)} if ids else {}


def latest_batches(session: Session, *, tenant: str, limit: int, before: UUID | None = None) -> list[BatchProgress]:
    """The tenant's newest batches, newest first; with `before` those older than that one."""
    older = "" if before is None else "AND id < :before"
    newest = (
        f"b.id IN (SELECT id FROM batches WHERE tenant = :tenant AND {_VISIBLE} {older} ORDER BY id DESC LIMIT :limit)"
    )
    rows = session.execute(
        text(_PROGRESS.format(condition=newest)),
        {"tenant": tenant, "limit": limit, **({} if before is None else {"before": before})},
    )
    return [_progress(row) for row in rows]


def find_batches(session: Session, hex_prefix: str, *, tenant: str) -> list[UUID]:
    """Up to two batches whose id begins so, so that a caller can tell one from ambiguous."""
    return list(
        session.scalars(
            text(f"""
        SELECT id FROM batches WHERE tenant = :tenant AND {_VISIBLE}
          AND starts_with(replace(CAST(id AS text), '-', ''), :prefix) ORDER BY id DESC LIMIT 2"""),
            {"tenant": tenant, "prefix": hex_prefix},
        )
    )


def request_cancel(session: Session, batch_id: UUID) -> bool:
    """Turn a live batch to cancelling; the dispatch leader writes its unfinished jobs. False: it has ended.

    One that is being validated stays so until its validator, or the next one, has noticed.
    """
    changed = session.execute(
        update(Batch)
        .where(
            Batch.id == batch_id,
            Batch.ending.is_(None),
            or_(
                Batch.state == BatchState.IN_PROGRESS,
                and_(Batch.state == BatchState.VALIDATING, Batch.input_file_id.is_not(None)),
            ),
        )
        .values(
            state=case((Batch.state == BatchState.IN_PROGRESS, BatchState.CANCELLING.value), else_=Batch.state),
            ending=Ending.CANCELLED,
            cancelling_at=text("clock_timestamp()"),
            paused_reason=None,
        )
        .returning(Batch.id)
    ).one_or_none()
    wake_dispatch(session)
    wake(session, VALIDATE_CHANNEL)
    return changed is not None


def resume(session: Session, batch_id: UUID) -> bool:
    """Let a paused batch go on; it is not screened again. False if it was not paused."""
    changed = session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.paused_reason.is_not(None))
        .values(paused_reason=None, screened=True)
        .returning(Batch.id)
    ).one_or_none()
    wake_dispatch(session)
    return changed is not None


def mark_expired(session: Session) -> list[UUID]:
    """Begin the end of batches whose window is over; they are wound down like cancelled ones."""
    return list(
        session.scalars(
            update(Batch)
            .where(
                Batch.state == BatchState.IN_PROGRESS,
                Batch.ending.is_(None),
                Batch.expires_at < text("clock_timestamp()"),
            )
            .values(ending=Ending.EXPIRED, paused_reason=None)
            .returning(Batch.id)
        )
    )


def shards_to_wind_down(session: Session, *, limit: int) -> list[tuple[int, Ending]]:
    """Shards that no worker holds, of batches that are being cancelled or have expired: (id, ending)."""
    rows = session.execute(
        text("""
        SELECT s.id, b.ending FROM batches b
        CROSS JOIN LATERAL (
            (SELECT id FROM shards WHERE batch_id = b.id AND state = 'pending' ORDER BY batch_id, id LIMIT :limit)
            UNION ALL
            (SELECT id FROM shards WHERE batch_id = b.id AND state = 'dispatched' ORDER BY id LIMIT :limit)) AS s
        WHERE b.state IN ('in_progress', 'cancelling') AND b.ending IS NOT NULL LIMIT :limit"""),
        {"limit": limit},
    ).all()
    return [(shard_id, Ending(ending)) for shard_id, ending in rows]


def end_unfinished(session: Session, *, shard_id: int, fence: int, code: str, message: str) -> int:
    """Give every unfinished job of a claimed shard, and its followers, an error result, under the fence: how many.

    One statement, as a write is: a leader that ends and its followers end together, or nothing of it happened.
    """
    return (
        session.execute(
            text(f"""
        WITH f AS (
            SELECT id, batch_id, seqs FROM shards WHERE id = :shard_id AND fence = :fence AND state = 'running'
            FOR NO KEY UPDATE
        ), i AS (
            INSERT INTO results (batch_id, seq, outcome, source, error_code, error_message,
                prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, duration_ms)
            SELECT f.batch_id, unnest(f.seqs), 'failed', 'none', :code, :message, 0, 0, 0, 0, 0 FROM f
            ON CONFLICT (batch_id, seq) DO NOTHING RETURNING batch_id, seq
        ), c AS (SELECT count(*) AS n FROM i){FOLLOWERS_OF_ENDED}
        UPDATE shards s SET done = s.done + c.n, failed = s.failed + c.n + k.n, followers = s.followers + k.n
        FROM f, c, k WHERE s.id = f.id RETURNING c.n + k.n"""),
            {"shard_id": shard_id, "fence": fence, "code": code, "message": message},
        ).scalar_one_or_none()
        or 0
    )


def screen(session: Session) -> list[tuple[UUID, str]]:
    """Pause batches of which over 30% of the first 200 finished jobs failed: (id, reason) of each.

    A batch that has passed is not looked at again. An engine that refuses everything is found out
    before it has refused a million jobs. A leader and its followers are one job here.
    """
    paused = []
    live = session.execute(
        text("""
        SELECT b.id, b.total FROM batches b WHERE b.state = 'in_progress' AND NOT b.screened
          AND b.ending IS NULL AND b.paused_reason IS NULL AND b.total - b.followers >= :jobs"""),
        {"jobs": SCREENED_JOBS},
    ).all()
    for batch_id, _ in live:
        seen, failures, common = session.execute(
            text("""
            SELECT count(*),
                count(*) FILTER (WHERE outcome = 'failed' AND error_code IS DISTINCT FROM 'budget_exceeded'),
                mode() WITHIN GROUP (
                    ORDER BY coalesce(error_code, '') || ': ' || left(coalesce(error_message, ''), 200))
                    FILTER (WHERE outcome = 'failed' AND error_code IS DISTINCT FROM 'budget_exceeded')
            FROM (SELECT * FROM results WHERE batch_id = :id AND source <> 'duplicate' LIMIT :jobs) AS first"""),
            {"id": batch_id, "jobs": SCREENED_JOBS},
        ).one()
        if failures > SCREENED_FAILURES:
            reason = f"{failures} of the first {seen} jobs failed, most often with {common}"
            session.execute(
                update(Batch)
                .where(Batch.id == batch_id, Batch.state == BatchState.IN_PROGRESS, Batch.ending.is_(None))
                .values(paused_reason=reason)
            )
            paused.append((batch_id, reason))
        elif seen >= SCREENED_JOBS:
            session.execute(update(Batch).where(Batch.id == batch_id).values(screened=True))
    return paused


def batches_to_finish(session: Session) -> dict[UUID, int]:
    """Batches whose last shard is closed, and how many jobs each has."""
    ready = select(Batch.id, Batch.total).where(Batch.state == BatchState.FINALIZING).order_by(Batch.id)
    return {batch_id: total for batch_id, total in session.execute(ready)}


def count_results(session: Session, batch_id: UUID, *, first: int, limit: int) -> int:
    """Results of the `limit` jobs from seq `first` on."""
    return int(
        session.execute(
            text("SELECT count(*) FROM results WHERE batch_id = :id AND seq >= :first AND seq < :first + :limit"),
            {"id": batch_id, "first": first, "limit": limit},
        ).scalar_one()
    )


def finish(session: Session, batch_id: UUID, *, results: int | None = None) -> int | None:
    """End a finalizing batch once every job has its result: how many had none (0 in a sound system).

    None: it is not finalizing, or another transaction holds it, and nothing was done. `results` were counted since it
    is finalizing; without them they are counted here. Jobs found without a result get new shards and the batch goes on:
    nothing is lost even to a defect.
    """
    locked = session.execute(
        text("SELECT total FROM batches WHERE id = :id AND state = 'finalizing' FOR UPDATE SKIP LOCKED"),
        {"id": batch_id},
    ).scalar_one_or_none()
    if locked is None:
        return None
    if results is None:
        results = count_results(session, batch_id, first=0, limit=locked)
    if results != locked and (missing := _missing(session, batch_id)):
        _requeue(session, batch_id, missing)
        return len(missing)
    session.execute(text("DELETE FROM job_tries WHERE batch_id = :id"), {"id": batch_id})
    give_up_lookups(session, batch_id)
    fold_usage(session, batch_id)
    session.execute(
        text(f"""
        UPDATE batches SET state = coalesce(ending, 'completed'), ending = coalesce(ending, 'completed'),
            ended_at = clock_timestamp(), sums = (
                SELECT jsonb_build_object({", ".join(f"'{name}', coalesce(sum({sum_}), 0)" for name, sum_ in _SUMS)})
                FROM shards s WHERE s.batch_id = :id)
        WHERE id = :id"""),
        {"id": batch_id},
    )
    add_results(session, batch_id)
    announce_end(session, batch_id)
    return 0


def _missing(session: Session, batch_id: UUID) -> list[int]:
    """The jobs without a result, which may be none though an old count says so.

    A follower is brought by its leader if that is missing too; else it runs by itself.
    """
    release(session, batch_id)
    return list(
        session.scalars(
            text("""
        SELECT j.seq FROM jobs j WHERE j.batch_id = :id
          AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = j.batch_id AND r.seq = j.seq)
          AND NOT EXISTS (SELECT FROM followers x WHERE x.batch_id = j.batch_id AND x.seq = j.seq)
        ORDER BY j.seq"""),
            {"id": batch_id},
        )
    )


def _requeue(session: Session, batch_id: UUID, missing: Sequence[int]) -> None:
    """Give these jobs new shards, and let the batch go on."""
    # The old shards give up what they lack and are counted anew, so that progress counts each job once.
    session.execute(
        text("""
        UPDATE shards s SET seqs = kept.seqs, done = cardinality(kept.seqs), followers = kept.followers,
            failed = kept.failed, truncated = kept.truncated, empty = kept.empty, prompt_tokens = kept.prompt_tokens,
            completion_tokens = kept.completion_tokens, cached_tokens = kept.cached_tokens,
            reasoning_tokens = kept.reasoning_tokens, served = kept.served, exact = kept.exact, semantic = kept.semantic
        FROM (
            SELECT h.id, coalesce(array_agg(r.seq ORDER BY r.seq) FILTER (WHERE r.leads), '{}') AS seqs,
                count(*) FILTER (WHERE NOT r.leads) AS followers,
                count(*) FILTER (WHERE r.outcome = 'failed') AS failed,
                count(*) FILTER (WHERE r.outcome = 'truncated') AS truncated,
                count(*) FILTER (WHERE r.outcome = 'empty') AS empty,
                coalesce(sum(r.prompt_tokens), 0) AS prompt_tokens,
                coalesce(sum(r.completion_tokens), 0) AS completion_tokens,
                coalesce(sum(r.cached_tokens), 0) AS cached_tokens,
                coalesce(sum(r.reasoning_tokens), 0) AS reasoning_tokens,
                count(*) FILTER (WHERE r.cache_entry_id IS NOT NULL
                    OR r.source = 'duplicate' AND r.outcome <> 'failed') AS served,
                count(*) FILTER (WHERE r.source = 'exact') AS exact,
                count(*) FILTER (WHERE r.source = 'semantic') AS semantic
            FROM shards h LEFT JOIN LATERAL (
                SELECT true AS leads, r.* FROM unnest(h.seqs) AS u (seq)
                JOIN results r ON r.batch_id = :id AND r.seq = u.seq
                UNION ALL
                SELECT false AS leads, r.* FROM unnest(h.seqs) AS u (seq)
                JOIN followers x ON x.batch_id = :id AND x.leader = u.seq
                JOIN results r ON r.batch_id = :id AND r.seq = x.seq) AS r ON true
            WHERE h.batch_id = :id GROUP BY h.id) AS kept
        WHERE s.id = kept.id"""),
        {"id": batch_id},
    )
    parts = [missing[start : start + 64] for start in range(0, len(missing), 64)]
    session.execute(
        text("INSERT INTO shards (batch_id, seqs, not_before) VALUES (:id, CAST(:seqs AS int4[]), clock_timestamp())"),
        [{"id": batch_id, "seqs": part} for part in parts],
    )
    session.execute(
        text(
            "UPDATE batches SET state = 'in_progress', finalizing_at = NULL, shards_left = :n, sums = NULL "
            "WHERE id = :id"
        ),
        {"id": batch_id, "n": len(parts)},
    )


def _progress(row: Row[Any]) -> BatchProgress:
    identifier, state, ending, priority, *rest, (cost, currency) = tuple(row)
    rest += [int(cost or 0), currency]
    return BatchProgress(identifier, BatchState(state), Ending(ending) if ending else None, Priority(priority), *rest)
