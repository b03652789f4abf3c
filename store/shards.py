"""The shard protocol's statements: claim, load, heartbeat, write, close, give back, recover, halve.

Every write of an attempt is guarded by its fence, so a process that wakes after its lease is over changes
nothing. Lock order: shard, usage, budget, batch. Each function is one step; the caller's transaction commits it.

LATERAL (… OFFSET 0), here and in the caches' statements: each row is looked up by its whole key. As plain joins they
are planned by what the statistics say of a batch, and those know nothing of the newest: a shard would read all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, TextClause, text
from sqlalchemy.orm import Session

from models.jobs import Affixes, Job, JobResult
from models.states import CacheMode, Trust
from store.arrays import Int4s, Int8s
from store.budgets import BUDGETED, release
from store.money import PAID, release_money
from store.notifications import wake_dispatch
from store.usage import slot_of
from store.written import columns_of, write_of

CRASHES_TO_HALVE = 3  # in a row without a committed result; simulated: halving at the first blamed the innocent
CRASHES_TO_POISON = 6  # of a shard with one unfinished job
RESTORE_STEP = 1_000_000_000  # that deploy/backup/restored.sql adds to fences
CRASHES_TO_RUN_ALONE = CRASHES_TO_HALVE - 1  # so no shard is halved for having run beside the one that kills

_RUNNABLE = "b.state = 'in_progress' AND b.ending IS NULL AND b.paused_reason IS NULL"


def _reserved(engine: str, worker: str, *, but: str = "NULL") -> str:
    """Whether a running shard, other than `but`, has this engine or this worker for itself."""
    return f"""EXISTS (
        SELECT FROM shards q WHERE q.state = 'running' AND (q.quarantined OR q.crashes >= {CRASHES_TO_RUN_ALONE})
            AND CASE WHEN q.quarantined THEN q.engine = {engine} ELSE q.worker = {worker} END
            AND q.id IS DISTINCT FROM {but})"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed shard. `runnable` is false when its batch was cancelled, paused or has expired meanwhile.

    A `quarantined` one holds suspects, which run with nothing else on their engine. `crashes` are its attempts in a
    row that died with their worker. `followers`: jobs of its batch take the results of others, which a write must know.
    `budgeted`: what its jobs take is counted, and must be reserved before it is asked for. `validates`: answers are
    held to the schema that their request states. `trust`: where their prompts may go. `paid`: there is money for them.
    """

    shard_id: int
    fence: int
    batch_id: UUID
    seqs: tuple[int, ...]
    endpoint: str
    runnable: bool
    quarantined: bool
    crashes: int
    tenant: str
    key_id: str
    cache: CacheMode
    affixes: Affixes
    followers: bool
    budgeted: bool
    validates: bool
    trust: Trust
    paid: bool

    @property
    def runs_alone(self) -> bool:
        """Whether it may take others down with it: then nothing runs beside it on its engine, or in its worker."""
        return self.quarantined or self.crashes >= CRASHES_TO_RUN_ALONE

    @property
    def is_first(self) -> bool:
        """Whether nobody had this shard before."""
        return self.fence % RESTORE_STEP == 1

    @property
    def key(self) -> tuple[int, int]:
        """What tells this attempt from every other."""
        return self.shard_id, self.fence


@dataclass(frozen=True, slots=True)
class Retry:
    """A job that failed transiently or lost its engine: how often by now, when to try again, and why."""

    seq: int
    tries: int
    engine_deaths: int
    not_before: datetime
    error: str


@dataclass(frozen=True, slots=True)
class LoadedJobs:
    """A claim's unfinished jobs in the shard's order; `next_due` is when the first waiting one may run, if any."""

    jobs: list[Job]
    next_due: datetime | None


def _claim_where(condition: str) -> TextClause:
    return text(f"""
        UPDATE shards s SET state = 'running', fence = s.fence + 1, done_at_claim = s.done, holder = :holder,
            engine = :engine, worker = :worker, not_before = NULL,
            lease_until = clock_timestamp() + make_interval(secs => :lease_s)
        FROM batches b WHERE b.id = s.batch_id AND {condition}
        RETURNING s.id AS shard_id, s.fence, s.batch_id, s.seqs, b.endpoint, ({_RUNNABLE}) AS runnable, s.quarantined,
            s.crashes, b.tenant, coalesce(b.key_id, '') AS key_id,
            coalesce(b.options ->> 'cache', 'off') AS cache, b.options -> 'affixes' AS affixes,
            b.followers > 0 AS followers, {BUDGETED} AS budgeted,
            coalesce(CAST(b.options ->> 'validate_answers' AS bool), false) AS validates,
            coalesce(b.options ->> 'trust', 'own') AS trust, {PAID} AS paid""")


_CLAIM = _claim_where("s.id = :shard_id AND s.state = ANY(:states)")
_HERE_RESERVED = _reserved("CAST(:engine AS text)", "CAST(:worker AS text)")
_CLAIM_NEXT = _claim_where(
    "s.id = (SELECT id FROM shards WHERE state = 'dispatched' AND batch_id <> ALL(CAST(:but AS uuid[])) "
    f"ORDER BY dispatched_at, id LIMIT 1 FOR UPDATE SKIP LOCKED) AND NOT {_HERE_RESERVED}"
)


def claim(
    session: Session, shard_id: int, *, holder: str, lease_s: float, states: Sequence[str] = ("dispatched",)
) -> Claim | None:
    """Take a shard and a new fence. None: somebody else has it, or it is done; then do nothing at all."""
    row = session.execute(
        _CLAIM,
        {
            "shard_id": shard_id,
            "holder": holder,
            "engine": None,
            "worker": None,
            "lease_s": lease_s,
            "states": list(states),
        },
    ).one_or_none()
    return _claimed(session, row)


def claim_next(
    session: Session,
    *,
    holder: str,
    lease_s: float,
    engine: str = "",
    worker: str = "",
    but: Collection[UUID] = (),
) -> Claim | None:
    """Take the shard that is to go first and nobody has claimed; None also while the engine or worker is reserved.

    None of the batches `but`.

    Claims for one engine go one after the other, so that none slips in beside a shard that runs alone.
    """
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:engine, 1))"), {"engine": engine})
    row = session.execute(
        _CLAIM_NEXT, {"holder": holder, "engine": engine, "worker": worker, "lease_s": lease_s, "but": list(but)}
    ).one_or_none()
    return _claimed(session, row)


def is_reserved(session: Session, *, engine: str, worker: str) -> bool:
    """Whether a shard has this engine or this worker, or waits to have it, for itself."""
    return bool(session.execute(text(f"SELECT {_HERE_RESERVED}"), {"engine": engine, "worker": worker}).scalar_one())


def is_alone(session: Session, claim: Claim) -> bool:
    """Whether no other shard runs where this one must be alone: on its engine, or else in its worker."""
    place = "engine" if claim.quarantined else "worker"
    return not session.execute(
        text(f"""
        SELECT EXISTS (SELECT FROM shards s, shards other WHERE s.id = :shard_id
            AND other.state = 'running' AND other.id <> s.id AND other.{place} = s.{place})"""),
        {"shard_id": claim.shard_id},
    ).scalar_one()


def load_jobs(session: Session, claim: Claim) -> LoadedJobs:
    """The shard's jobs without a result, in its order; those waiting for a later try are left out."""
    rows = session.execute(
        text("""
        SELECT u.seq, j.body, coalesce(t.tries, 0), coalesce(t.engine_deaths, 0), j.stoker, t.not_before,
               coalesce(t.not_before > clock_timestamp(), false)
        FROM unnest(CAST(:seqs AS int4[])) WITH ORDINALITY AS u (seq, place)
        LEFT JOIN LATERAL (
            SELECT true AS ended FROM results WHERE batch_id = :batch_id AND seq = u.seq OFFSET 0) AS r ON true
        CROSS JOIN LATERAL (
            SELECT body, stoker FROM jobs WHERE batch_id = :batch_id AND seq = u.seq OFFSET 0) AS j
        LEFT JOIN LATERAL (
            SELECT * FROM job_tries WHERE batch_id = :batch_id AND seq = u.seq OFFSET 0) AS t ON true
        WHERE r.ended IS NULL ORDER BY u.place"""),
        {"seqs": Int4s(claim.seqs), "batch_id": claim.batch_id},
    ).all()
    return LoadedJobs(
        jobs=[Job(*job) for *job, _, waits in rows if not waits],
        next_due=min((due for *_, due, waits in rows if waits), default=None),
    )


def extend_leases(session: Session, fences: Mapping[int, int], *, lease_s: float) -> dict[int, bool]:
    """Heartbeat of all held shards (id → fence): the ids still ours → whether they may go on.

    They may not when their batch may not, nor when another shard waits to have their engine or worker for itself.

    An id that is missing from the answer has lost its fence: cancel its requests and write nothing. A shard that is
    locked is left as it is: a write extends its lease itself, and one shard's wait must not cost the others theirs.
    """
    rows = session.execute(
        text(f"""
        WITH held AS (
            SELECT s.id, ({_RUNNABLE}) AND NOT {_reserved("s.engine", "s.worker", but="s.id")} AS runnable
            FROM unnest(CAST(:ids AS int8[]), CAST(:fences AS int8[])) AS h(id, fence)
            JOIN shards s ON s.id = h.id AND s.fence = h.fence AND s.state = 'running'
            JOIN batches b ON b.id = s.batch_id
        ), extended AS (
            UPDATE shards SET lease_until = clock_timestamp() + make_interval(secs => :lease_s) WHERE id IN (
                SELECT s.id FROM unnest(CAST(:ids AS int8[]), CAST(:fences AS int8[])) AS h(id, fence)
                JOIN shards s ON s.id = h.id AND s.fence = h.fence AND s.state = 'running'
                FOR NO KEY UPDATE OF s SKIP LOCKED)
        )
        SELECT id, runnable FROM held"""),
        {"ids": Int8s(fences), "fences": Int8s(fences.values()), "lease_s": lease_s},
    ).all()
    return {shard_id: runnable for shard_id, runnable in rows}


def write_results(
    session: Session, claim: Claim, results: Sequence[JobResult], *, engine_id: int | None, lease_s: float
) -> int | None:
    """Insert results under the fence and count them: the shard's finished jobs, or None if the fence is lost.

    The results of their followers come with them, in the same statement, so whoever dies leaves both or neither.
    Repeating the call, after an ambiguous COMMIT say, inserts and counts nothing twice.
    """
    written: int | None = _write(session, claim, results, engine_id=engine_id, lease_s=lease_s, told="done")
    return written


def write_and_tell(
    session: Session, claim: Claim, results: Sequence[JobResult], *, engine_id: int | None, lease_s: float
) -> list[int] | None:
    """Write as `write_results` does: the seqs of those of the results that this very call inserted."""
    written: list[int] | None = _write(session, claim, results, engine_id=engine_id, lease_s=lease_s, told="inserted")
    return written


def _write(
    session: Session, claim: Claim, results: Sequence[JobResult], *, engine_id: int | None, lease_s: float, told: str
) -> Any:
    served = any(result.entry is not None for result in results)
    return session.execute(
        write_of(told=told, followed=claim.followers, served=served),
        {
            "batch_id": claim.batch_id,
            "shard_id": claim.shard_id,
            "fence": claim.fence,
            "tenant": claim.tenant,
            "key_id": claim.key_id,
            "slot": slot_of(claim.shard_id),
            "lease_s": lease_s,
            **columns_of(results, engine_id=engine_id),
        },
    ).scalar_one_or_none()


def hold_shard(session: Session, claim: Claim) -> bool:
    """Lock the claimed shard to the end of the transaction; false if the fence is lost."""
    held = session.execute(
        text("SELECT 1 FROM shards WHERE id = :shard_id AND fence = :fence AND state = 'running' FOR NO KEY UPDATE"),
        {"shard_id": claim.shard_id, "fence": claim.fence},
    ).one_or_none()
    return held is not None


def write_retries(session: Session, claim: Claim, retries: Sequence[Retry]) -> bool:
    """Record transient failures under the fence; false if the fence is lost."""
    if not hold_shard(session, claim):
        return False
    session.execute(
        text("""
        INSERT INTO job_tries (batch_id, seq, tries, engine_deaths, not_before, last_error)
        VALUES (:batch_id, :seq, :tries, :engine_deaths, :not_before, :error)
        ON CONFLICT (batch_id, seq) DO UPDATE SET tries = excluded.tries, engine_deaths = excluded.engine_deaths,
            not_before = excluded.not_before, last_error = excluded.last_error"""),
        [
            {
                "batch_id": claim.batch_id,
                "seq": r.seq,
                "tries": r.tries,
                "engine_deaths": r.engine_deaths,
                "not_before": r.not_before,
                "error": r.error,
            }
            for r in retries
        ],
    )
    return True


def close(session: Session, claim: Claim) -> bool:
    """End a shard whose jobs all have results; the last one of a batch turns it to finalizing.

    True if this call closed it. Guarded by the fence and by the count, so exactly one closer exists.
    """
    closed = session.execute(
        text("""
        UPDATE shards SET state = 'done', fence = fence + 1, lease_until = NULL
        WHERE id = :shard_id AND fence = :fence AND state = 'running' AND done = cardinality(seqs)
        RETURNING batch_id"""),
        {"shard_id": claim.shard_id, "fence": claim.fence},
    ).one_or_none()
    if closed is None:
        return False
    if claim.budgeted:
        release(session, [claim.shard_id])
    if claim.paid:
        release_money(session, [claim.shard_id])
    left = session.execute(
        text("""
        UPDATE batches SET shards_left = shards_left - 1,
            finalizing_at = CASE WHEN shards_left = 1 THEN clock_timestamp() END,
            state = CASE WHEN shards_left = 1 THEN 'finalizing' ELSE state END
        WHERE id = :batch_id RETURNING shards_left"""),
        {"batch_id": claim.batch_id},
    ).scalar_one()
    if left == 0:
        wake_dispatch(session)
    return True


def give_back(session: Session, claim: Claim, *, wait_s: float) -> bool:
    """Return an unfinished shard to pending, to be dispatched after `wait_s`; false if the fence is lost."""
    returned = session.execute(
        text("""
        UPDATE shards SET state = 'pending', fence = fence + 1, lease_until = NULL,
            crashes = CASE WHEN done > done_at_claim THEN 0 ELSE crashes END,
            not_before = clock_timestamp() + make_interval(secs => :wait_s)
        WHERE id = :shard_id AND fence = :fence AND state = 'running' RETURNING 1"""),
        {"shard_id": claim.shard_id, "fence": claim.fence, "wait_s": wait_s},
    ).one_or_none()
    if claim.budgeted and returned is not None:
        release(session, [claim.shard_id])
    if claim.paid and returned is not None:
        release_money(session, [claim.shard_id])
    wake_dispatch(session)
    return returned is not None


@dataclass(frozen=True, slots=True)
class Recovered:
    """A shard taken back from a dead lease. `crashes` counts attempts in a row that committed nothing."""

    shard_id: int
    crashes: int


def recover_dead_leases(session: Session, *, lease_s: float) -> list[Recovered]:
    """Take over shards whose lease is over: the only place that does, and that counts a crash.

    Leases are spared for one lease time after Postgres started: their holders could not extend them.
    """
    rows = session.execute(
        text("""
        UPDATE shards SET state = 'pending', fence = fence + 1, lease_until = NULL, not_before = clock_timestamp(),
            crashes = CASE WHEN done > done_at_claim THEN 0 ELSE crashes + 1 END
        WHERE id IN (
            SELECT id FROM shards WHERE state = 'running' AND lease_until < clock_timestamp()
              AND pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => :lease_s)
            ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED)
        RETURNING id, crashes"""),
        {"lease_s": lease_s},
    ).all()
    if rows:
        release(session, [shard_id for shard_id, _ in rows])
        release_money(session, [shard_id for shard_id, _ in rows], is_spent=True)
    return [Recovered(shard_id=shard_id, crashes=crashes) for shard_id, crashes in rows]


def halve(session: Session, claim: Claim) -> int:
    """Split a claimed shard's unfinished jobs into two new shards: how many jobs it had left.

    The parent keeps its finished jobs and must be closed by the caller. One job alone is not split: 1.
    """
    left = list(
        session.scalars(
            text("""
        SELECT u.seq FROM unnest(CAST(:seqs AS int4[])) WITH ORDINALITY AS u(seq, place)
        WHERE NOT EXISTS (SELECT FROM results r WHERE r.batch_id = :batch_id AND r.seq = u.seq)
        ORDER BY u.place"""),
            {"seqs": Int4s(claim.seqs), "batch_id": claim.batch_id},
        )
    )
    if len(left) < 2:
        return len(left)
    middle = len(left) // 2
    for half in (left[:middle], left[middle:]):
        crashes = CRASHES_TO_HALVE if len(half) == 1 else 0
        _split_off(session, claim, half, quarantined=claim.quarantined, crashes=crashes)
    return len(left)


def quarantine(session: Session, claim: Claim, seqs: Sequence[int]) -> bool:
    """Move suspects of a claimed shard into a quarantined shard of their own; false if the fence is lost.

    Repeating the call, after an ambiguous COMMIT say, moves nothing twice.
    """
    has_them = session.execute(
        text("""
        SELECT seqs @> CAST(:seqs AS int4[]) FROM shards
        WHERE id = :shard_id AND fence = :fence AND state = 'running' FOR NO KEY UPDATE"""),
        {"seqs": Int4s(seqs), "shard_id": claim.shard_id, "fence": claim.fence},
    ).scalar_one_or_none()
    if has_them:
        _split_off(session, claim, seqs, quarantined=True, crashes=0)
    return has_them is not None


def _split_off(session: Session, claim: Claim, seqs: Sequence[int], *, quarantined: bool, crashes: int) -> None:
    """Move unfinished jobs of a claimed and locked shard to a new one, with their part of its cost."""
    cost = session.execute(
        text("""
        WITH old AS (
            SELECT id, tokens, tokens * :count / cardinality(seqs) AS cost FROM shards WHERE id = :shard_id)
        UPDATE shards s SET tokens = old.tokens - old.cost,
            seqs = ARRAY(SELECT u FROM unnest(s.seqs) u WHERE u <> ALL(CAST(:seqs AS int4[])))
        FROM old WHERE s.id = old.id RETURNING old.cost"""),
        {"seqs": Int4s(seqs), "shard_id": claim.shard_id, "count": len(seqs)},
    ).scalar_one()
    session.execute(
        text("""
        INSERT INTO shards (batch_id, seqs, tokens, not_before, crashes, quarantined)
        VALUES (:batch_id, CAST(:seqs AS int4[]), :cost, clock_timestamp(), :crashes, :quarantined)"""),
        {"batch_id": claim.batch_id, "seqs": Int4s(seqs), "cost": cost, "crashes": crashes, "quarantined": quarantined},
    )
    session.execute(
        text("UPDATE batches SET shards_left = shards_left + 1 WHERE id = :batch_id"), {"batch_id": claim.batch_id}
    )


def _claimed(session: Session, row: Row[Any] | None) -> Claim | None:
    if row is None:
        return None
    wake_dispatch(session)
    fields = row._asdict()
    affixes = Affixes(**(fields.pop("affixes") or {}))
    return Claim(
        **{
            **fields,
            "seqs": tuple(fields["seqs"]),
            "cache": CacheMode(fields["cache"]),
            "trust": Trust(fields["trust"]),
            "affixes": affixes,
        }
    )
