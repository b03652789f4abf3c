"""SQL of the exact cache: answers by key, and the epochs that make a tenant's answers old. Postgres is its truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.jobs import CachedAnswer

EXPIRED_AT_ONCE = 2_000


@dataclass(frozen=True, slots=True)
class NewAnswer:
    """An engine's answer to keep, and the job that it was given to."""

    key: bytes
    seq: int
    response: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int


def epoch_of(session: Session, tenant: str) -> int:
    """The tenant's epoch; answers of an earlier one are never found again."""
    found = session.scalar(
        text("SELECT epoch FROM cache_epochs WHERE tenant = :tenant AND scope = 'tenant'"), {"tenant": tenant}
    )
    return int(found or 0)


def raise_epoch(session: Session, tenant: str) -> int:
    """Make all of the tenant's answers old: how many there were. Their rows go too."""
    session.execute(
        text("""
        INSERT INTO cache_epochs (tenant, scope, epoch) VALUES (:tenant, 'tenant', 1)
        ON CONFLICT (tenant, scope) DO UPDATE SET epoch = cache_epochs.epoch + 1"""),
        {"tenant": tenant},
    )
    return len(
        session.scalars(text("DELETE FROM cache_entries WHERE tenant = :tenant RETURNING 1"), {"tenant": tenant}).all()
    )


def find_answers(session: Session, tenant: str, keys: Sequence[bytes]) -> dict[bytes, CachedAnswer]:
    """The answers that there are for these keys and that have not expired."""
    rows = session.execute(
        text("""
        SELECT key, id, response, status_code, prompt_tokens, completion_tokens FROM cache_entries
        WHERE tenant = :tenant AND key = ANY(CAST(:keys AS bytea[])) AND expires_at > clock_timestamp()"""),
        {"tenant": tenant, "keys": list(keys)},
    )
    return {bytes(key): CachedAnswer(*rest) for key, *rest in rows}


def keep_answers(
    session: Session, tenant: str, batch_id: UUID, answers: Sequence[NewAnswer], *, ttl_s: float
) -> Mapping[bytes, CachedAnswer]:
    """Keep answers under their keys, unless one is there that has not expired: those that were kept."""
    rows = session.execute(
        text("""
        INSERT INTO cache_entries (tenant, key, response, status_code, prompt_tokens, completion_tokens, batch_id, seq,
            expires_at)
        SELECT :tenant, u.key, u.response, u.status_code, u.prompt_tokens, u.completion_tokens, :batch_id, u.seq,
            clock_timestamp() + make_interval(secs => :ttl_s)
        FROM unnest(CAST(:keys AS bytea[]), CAST(:seqs AS int4[]), CAST(:responses AS text[]),
            CAST(:status_codes AS int2[]), CAST(:prompt_tokens AS int4[]), CAST(:completion_tokens AS int4[]))
            AS u (key, seq, response, status_code, prompt_tokens, completion_tokens)
        ORDER BY u.key
        ON CONFLICT (tenant, key) DO UPDATE SET response = excluded.response, status_code = excluded.status_code,
            prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens,
            batch_id = excluded.batch_id, seq = excluded.seq, created_at = clock_timestamp(),
            expires_at = excluded.expires_at
        WHERE cache_entries.expires_at <= clock_timestamp()
        RETURNING key, id, response, status_code, prompt_tokens, completion_tokens"""),
        {
            "tenant": tenant,
            "batch_id": batch_id,
            "ttl_s": ttl_s,
            "keys": [answer.key for answer in answers],
            "seqs": [answer.seq for answer in answers],
            "responses": [answer.response for answer in answers],
            "status_codes": [answer.status_code for answer in answers],
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "completion_tokens": [answer.completion_tokens for answer in answers],
        },
    )
    return {bytes(key): CachedAnswer(*rest) for key, *rest in rows}


def delete_expired(session: Session) -> bool:
    """Delete some expired answers; whether there may be more."""
    gone = session.scalars(
        text("""
        DELETE FROM cache_entries WHERE id IN (
            SELECT id FROM cache_entries WHERE expires_at <= clock_timestamp()
            ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED) RETURNING 1"""),
        {"limit": EXPIRED_AT_ONCE},
    ).all()
    return len(gone) == EXPIRED_AT_ONCE


@dataclass(frozen=True, slots=True)
class CacheTotals:
    """A tenant's cache over the batches that are not deleted."""

    entries: int
    jobs: int
    served: int
    saved_tokens: int


def cache_totals(session: Session, tenant: str) -> CacheTotals:
    """How many answers are kept, and what the tenant's jobs took from them."""
    entries = session.scalar(
        text("SELECT count(*) FROM cache_entries WHERE tenant = :tenant AND expires_at > clock_timestamp()"),
        {"tenant": tenant},
    )
    sums = session.execute(
        text("""
        SELECT CAST(coalesce(sum(s.done), 0) AS int8), CAST(coalesce(sum(s.served), 0) AS int8),
            CAST(coalesce(sum(s.saved_tokens), 0) AS int8)
        FROM shards s JOIN batches b ON b.id = s.batch_id WHERE b.tenant = :tenant AND b.deleted_at IS NULL"""),
        {"tenant": tenant},
    ).one()
    return CacheTotals(int(entries or 0), *sums)
