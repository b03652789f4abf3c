"""What is told of the cache, and what is done to it by hand: figures of namespaces, clearing, times to live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from runtime.errors import NotFound
from store.answers import TENANT_SCOPE, checkpoint_scope, raise_epoch
from store.engines import checkpoints

WINDOW_LOOKUPS = 1_000


@dataclass(frozen=True, slots=True)
class NamespaceReport:
    """A namespace; `policy` is its state as cache/policy.py writes it. Counters are of all versions together.

    `settled`: lookups of the present version before the first shard with an audit that the policy has not heard of,
    None if it has of all; `settled_decided`: decisions to serve before that shard, likewise.
    `free_answers` counts kept answers that are free text. `worst_window` is the share of wrong answers in the worst
    WINDOW_LOOKUPS of the present version that retention has left, as its audits suggest: errors seen, each for those
    that were not audited.
    """

    id: int
    alias: str
    checkpoint: str
    template: str
    secret: bytes
    policy: str
    began_at: datetime
    ttl_s: float | None
    lookups: int
    served: int
    audits: int
    saved_tokens: int
    audit_tokens: int
    asked_twice: int
    differed: int
    entries: int
    answers: int
    free_answers: int
    settled: int | None
    settled_decided: int | None
    worst_window: float


@dataclass(frozen=True, slots=True)
class CacheTotals:
    """A tenant's cache over the batches that are not deleted: their jobs, by where results came from.

    `unlooked` counts lookups that were misses because a part of the cache was down.
    """

    entries: int
    jobs: int
    exact: int
    duplicate: int
    semantic: int
    saved_tokens: int
    unlooked: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """What was taken away: keys that Redis may still have, secrets of namespaces that Chroma may still have."""

    keys: list[bytes]
    secrets: list[bytes]


def cache_totals(session: Session, tenant: str) -> CacheTotals:
    """How many answers are kept, and what the tenant's jobs took from them."""
    entries = session.scalar(
        text("SELECT count(*) FROM cache_entries WHERE tenant = :tenant AND expires_at > clock_timestamp()"),
        {"tenant": tenant},
    )
    jobs, exact, duplicate, semantic, saved, unlooked = session.execute(
        text("""
        SELECT CAST(coalesce(sum(s.done + s.followers), 0) AS int8), CAST(coalesce(sum(s.exact), 0) AS int8),
            CAST(coalesce(sum(s.served - s.exact - s.semantic), 0) AS int8),
            CAST(coalesce(sum(s.semantic), 0) AS int8), CAST(coalesce(sum(s.saved_tokens), 0) AS int8),
            CAST(coalesce(sum(s.unlooked), 0) AS int8)
        FROM shards s JOIN batches b ON b.id = s.batch_id WHERE b.tenant = :tenant AND b.deleted_at IS NULL"""),
        {"tenant": tenant},
    ).one()
    return CacheTotals(int(entries or 0), jobs, exact, duplicate, semantic, saved, unlooked)


def namespace_reports(session: Session, tenant: str) -> list[NamespaceReport]:
    """All namespaces of a tenant, by id."""
    rows = session.execute(
        text("""
        SELECT n.id, n.alias, n.checkpoint, n.template, n.secret, n.policy, n.created_at, n.ttl_s, n.lookups, n.served,
            n.audits, n.saved_tokens, n.audit_tokens, n.asked_twice, n.differed, e.living, e.all_answers, e.free,
            l.lookups, l.decided, coalesce(w.worst, 0)
        FROM cache_namespaces n
        CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE vector IS NOT NULL AND expires_at > clock_timestamp()) AS living,
                count(*) AS all_answers, count(*) FILTER (WHERE answer IS NULL) AS free
            FROM cache_entries WHERE namespace_id = n.id) e
        CROSS JOIN LATERAL (
            SELECT min(place) AS lookups, min(decided) AS decided FROM cache_lookups
            WHERE namespace_id = n.id AND audited AND NOT folded
                AND version = CAST(CAST(n.policy AS json) ->> 'version' AS int4)) l
        CROSS JOIN LATERAL (
            SELECT max(wrong) / :window AS worst FROM (
                SELECT sum(1 / rate - 1) AS wrong FROM cache_lookups
                WHERE namespace_id = n.id AND audited AND agreed IS NOT TRUE AND judged_at IS NOT NULL
                    AND version = CAST(CAST(n.policy AS json) ->> 'version' AS int4)
                GROUP BY place / :window) AS windows) w
        WHERE n.tenant = :tenant ORDER BY n.id"""),
        {"tenant": tenant, "window": WINDOW_LOOKUPS},
    )
    return [NamespaceReport(*row) for row in rows]


def clear_all(session: Session, tenant: str) -> Cleared:
    """Make all of a tenant's answers old and delete them."""
    raise_epoch(session, tenant, TENANT_SCOPE)
    return _forget(session, tenant, "true")


def clear_checkpoint(session: Session, tenant: str, checkpoint: str) -> Cleared:
    """Make the answers of a checkpoint old. Exact ones stay as rows, which nothing finds, until they expire.

    Raises NotFound if no engine ever had it.
    """
    if checkpoint not in checkpoints(session):
        raise NotFound(
            f"no engine here had the checkpoint {checkpoint!r}: a manifest names it, as the checkpoint_digest of its "
            "engines, or as their url where the engine is not ours"
        )
    raise_epoch(session, tenant, checkpoint_scope(checkpoint))
    return _forget(session, tenant, "checkpoint = :value", value=checkpoint)


def clear_template(session: Session, tenant: str, namespace_id: int) -> Cleared:
    """Make the answers to the template of this namespace old, whatever the checkpoint. Raises NotFound."""
    scope = session.scalar(
        text("SELECT scope FROM cache_namespaces WHERE tenant = :tenant AND id = :id"),
        {"tenant": tenant, "id": namespace_id},
    )
    if scope is None:
        raise _no_namespace(namespace_id)
    raise_epoch(session, tenant, scope)
    return _forget(session, tenant, "scope = :value", value=scope)


def clear_sources(session: Session, tenant: str, sources: Sequence[str]) -> Cleared:
    """Delete the answers whose prompts were made from one of these sources."""
    keys = session.scalars(
        text("""
        DELETE FROM cache_entries WHERE id IN (
            SELECT entry_id FROM cache_sources WHERE tenant = :tenant AND source = ANY(CAST(:sources AS text[])))
        RETURNING key"""),
        {"tenant": tenant, "sources": list(sources)},
    )
    return Cleared([bytes(key) for key in keys], [])


def set_ttl(session: Session, tenant: str, namespace_id: int, *, ttl_s: float) -> Cleared:
    """Give a namespace's entries, those there are and those to come, a time to live of their own. Raises NotFound."""
    changed = session.scalar(
        text("UPDATE cache_namespaces SET ttl_s = :ttl WHERE tenant = :tenant AND id = :id RETURNING 1"),
        {"tenant": tenant, "id": namespace_id, "ttl": ttl_s},
    )
    if changed is None:
        raise _no_namespace(namespace_id)
    keys = session.scalars(
        text("""
        UPDATE cache_entries SET expires_at = created_at + make_interval(secs => :ttl)
        WHERE namespace_id = :id RETURNING key"""),
        {"id": namespace_id, "ttl": ttl_s},
    )
    return Cleared([bytes(key) for key in keys], [])


def _forget(session: Session, tenant: str, condition: str, *, value: str = "") -> Cleared:
    """Delete the namespaces that meet the condition and their entries; all entries if it is `true`.

    Lookups go with their namespace, before the entries: workers lock them in this order too.
    """
    gone = session.execute(
        text(f"DELETE FROM cache_namespaces WHERE tenant = :tenant AND {condition} RETURNING id, secret"),
        {"tenant": tenant, "value": value},
    ).all()
    keys = session.scalars(
        text("""
        DELETE FROM cache_entries WHERE tenant = :tenant
            AND (CAST(:everything AS bool) OR namespace_id = ANY(CAST(:ids AS int8[]))) RETURNING key"""),
        {"tenant": tenant, "everything": condition == "true", "ids": [identifier for identifier, _ in gone]},
    )
    return Cleared([bytes(key) for key in keys], [bytes(secret) for _, secret in gone])


def _no_namespace(namespace_id: int) -> NotFound:
    return NotFound(f"no namespace {namespace_id}; `stoker cache stats` lists them")
