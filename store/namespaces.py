"""SQL of the semantic cache: namespaces with their policy, lookups with what the engine said, entries with vectors.

Postgres is the truth; Chroma only tells which entries are near. Lock order: shard, then namespace, by id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.shards import Claim

LOCK_TIMEOUT: Final = "5s"
IDLE_AT_ONCE: Final = 100  # namespaces in a transaction


@dataclass(frozen=True, slots=True)
class NewNamespace:
    """A namespace as its first lookup begins it."""

    key: bytes
    endpoint: str
    alias: str
    checkpoint: str
    embedder: str
    template: str
    scope: str
    secret: bytes
    policy: str


@dataclass(frozen=True, slots=True)
class OpenNamespace:
    """A namespace as a worker knows it: `secret` keys its coins, `ttl_s` is its own time to live, if it has one."""

    id: int
    key: bytes
    secret: bytes
    ttl_s: float | None


@dataclass(frozen=True, slots=True)
class HeldNamespace:
    """A namespace locked to the end of the transaction; `fit` is the number of its newest model."""

    policy: str
    fit: int
    asked_twice: int


@dataclass(frozen=True, slots=True)
class JudgedLookup:
    """A lookup of which the engine's answer is known; `features` are float32, none if nothing was near.

    `agreed` is None where the engine's answer will not be known: its batch ended, or another checkpoint has answered.
    """

    wished: bool
    audited: bool
    in_shadow: bool
    coin: float
    rate: float
    features: bytes | None
    agreed: bool | None
    repeated: bool | None
    tokens: int
    version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the engine said of a job: its answer as answers are compared, None if it may not be kept.

    `repeated`: whether it said the same when asked twice, None if it was asked once. `tokens` is what that took.
    """

    seq: int
    answer: str | None
    repeated: bool | None
    tokens: int


@dataclass(frozen=True, slots=True)
class NewLookup:
    """A lookup that is not served: its job runs, and its answer will be compared with `answer`."""

    seq: int
    namespace_id: int
    version: int
    place: int
    decided: int
    served_beside: int
    coin: float
    rate: float
    wished: bool
    in_shadow: bool
    audited: bool
    answer: str | None
    features: bytes | None


@dataclass(frozen=True, slots=True)
class EntryFacts:
    """What an entry is compared by."""

    payload: str
    answer: str


def open_namespaces(session: Session, tenant: str, wanted: Sequence[NewNamespace]) -> dict[bytes, OpenNamespace]:
    """The namespaces with these keys, made if they are new; safe in several processes at once."""
    session.execute(
        text("""
        INSERT INTO cache_namespaces (tenant, key, endpoint, alias, checkpoint, embedder, template, scope,
            secret, policy)
        VALUES (:tenant, :key, :endpoint, :alias, :checkpoint, :embedder, :template, :scope, :secret,
            :policy)
        ON CONFLICT (tenant, key) DO NOTHING"""),
        [
            {
                "tenant": tenant,
                "key": new.key,
                "endpoint": new.endpoint,
                "alias": new.alias,
                "checkpoint": new.checkpoint,
                "embedder": new.embedder,
                "template": new.template,
                "scope": new.scope,
                "secret": new.secret,
                "policy": new.policy,
            }
            for new in sorted(wanted, key=lambda new: new.key)
        ],
    )
    return find_namespaces(session, tenant, [new.key for new in wanted])


def find_namespaces(session: Session, tenant: str, keys: Sequence[bytes]) -> dict[bytes, OpenNamespace]:
    """Those of these namespaces that there are."""
    rows = session.execute(
        text("""
        SELECT id, key, secret, ttl_s FROM cache_namespaces
        WHERE tenant = :tenant AND key = ANY(CAST(:keys AS bytea[]))"""),
        {"tenant": tenant, "keys": list(keys)},
    )
    return {
        bytes(key): OpenNamespace(identifier, bytes(key), bytes(secret), ttl) for identifier, key, secret, ttl in rows
    }


def lookups_of(session: Session, batch_id: UUID, seqs: Sequence[int]) -> set[int]:
    """The jobs among these that were looked up by an earlier attempt: they are not looked up again."""
    return set(
        session.scalars(
            text("""
        SELECT u.seq FROM unnest(CAST(:seqs AS int4[])) AS u (seq) CROSS JOIN LATERAL (
            SELECT FROM cache_lookups WHERE batch_id = :batch_id AND seq = u.seq OFFSET 0) AS l"""),
            {"batch_id": batch_id, "seqs": list(seqs)},
        )
    )


def count_unlooked(session: Session, claim: Claim, lookups: int) -> None:
    """Count lookups that could not be made because a part of the cache was down, each at its shard's first attempt."""
    if not claim.is_first:
        return
    session.execute(
        text("UPDATE shards SET unlooked = unlooked + :lookups WHERE id = :id AND fence = :fence"),
        {"id": claim.shard_id, "fence": claim.fence, "lookups": lookups},
    )


def hold_namespace(session: Session, namespace_id: int) -> HeldNamespace | None:
    """Lock a namespace to the end of the transaction; None if it was cleared meanwhile.

    Who waits for it longer than LOCK_TIMEOUT gives up: ServiceUnreachable, as from any database that is too slow.
    """
    session.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    row = session.execute(
        text("SELECT policy, fit, asked_twice FROM cache_namespaces WHERE id = :id FOR UPDATE"), {"id": namespace_id}
    ).one_or_none()
    return None if row is None else HeldNamespace(*row)


def take_news(session: Session, namespace_id: int) -> list[JudgedLookup]:
    """The lookups of a held namespace that were judged since the last call: each is given once."""
    rows = session.execute(
        text("""
        UPDATE cache_lookups SET folded = true
        WHERE namespace_id = :id AND judged_at IS NOT NULL AND NOT folded
        RETURNING wished, audited, in_shadow, coin, rate, features, agreed, repeated, tokens, version"""),
        {"id": namespace_id},
    )
    return [JudgedLookup(*row) for row in rows]


def unsettled_answers(session: Session, namespace_id: int, *, version: int) -> int:
    """Answers served by shards of a version with an audit that the policy has not heard of."""
    return int(
        session.execute(
            text("""
        SELECT coalesce(sum(served_beside), 0) FROM (
            SELECT DISTINCT batch_id, place, served_beside FROM cache_lookups
            WHERE namespace_id = :id AND version = :version AND audited AND NOT folded) AS shards"""),
            {"id": namespace_id, "version": version},
        ).scalar_one()
    )


@dataclass(frozen=True, slots=True)
class Round:
    """What one shard's lookups add to a namespace's counters."""

    lookups: int
    served: int
    audits: int
    saved_tokens: int


def store_policy(
    session: Session, namespace_id: int, policy: str, *, made: Round, news: Sequence[JudgedLookup]
) -> None:
    """Keep the policy of a held namespace; count a round, and what the lookups judged since have cost."""
    repeated = [one.repeated for one in news if one.repeated is not None]
    session.execute(
        text("""
        UPDATE cache_namespaces SET policy = :policy, lookups = lookups + :lookups, served = served + :served,
            audits = audits + :audits, saved_tokens = saved_tokens + :saved, audit_tokens = audit_tokens + :spent,
            asked_twice = asked_twice + :asked, differed = differed + :differed, used_at = clock_timestamp()
        WHERE id = :id"""),
        {
            "id": namespace_id,
            "policy": policy,
            "lookups": made.lookups,
            "served": made.served,
            "audits": made.audits,
            "saved": made.saved_tokens,
            "spent": sum(_spent(one) for one in news),
            "asked": len(repeated),
            "differed": repeated.count(False),
        },
    )


def _spent(one: JudgedLookup) -> int:
    """The tokens that would not have been spent without audits: a job asked twice that ran anyway spent one call."""
    if one.audited:
        return one.tokens
    return 0 if one.repeated is None else one.tokens // 2


def write_lookups(session: Session, batch_id: UUID, lookups: Sequence[NewLookup]) -> None:
    """Remember lookups that were not served, if there are any."""
    if not lookups:
        return
    session.execute(
        text("""
        INSERT INTO cache_lookups (batch_id, seq, namespace_id, version, place, decided, served_beside, coin, rate,
            wished, in_shadow, audited, answer, features)
        VALUES (:batch_id, :seq, :namespace_id, :version, :place, :decided, :served_beside, :coin, :rate,
            :wished, :in_shadow, :audited, :answer, :features)"""),
        [
            {
                "batch_id": batch_id,
                "seq": one.seq,
                "namespace_id": one.namespace_id,
                "version": one.version,
                "place": one.place,
                "decided": one.decided,
                "served_beside": one.served_beside,
                "coin": one.coin,
                "rate": one.rate,
                "wished": one.wished,
                "in_shadow": one.in_shadow,
                "audited": one.audited,
                "answer": one.answer,
                "features": one.features,
            }
            for one in lookups
        ],
    )


def judge_lookups(session: Session, batch_id: UUID, verdicts: Sequence[Verdict], *, checkpoint: str | None) -> None:
    """Compare what would have been served with the engine's answers; a missing answer agrees with nothing.

    Jobs that were not looked up are passed over, so are those that were judged before. Another checkpoint's answer says
    nothing of a namespace, so that `agreed` is unknown; so it is with `checkpoint` None, where it is not known.
    """
    session.execute(
        text("""
        UPDATE cache_lookups l SET repeated = :repeated, tokens = :tokens, judged_at = clock_timestamp(),
            agreed = CASE WHEN n.checkpoint = :checkpoint
                THEN l.answer IS NOT NULL AND l.answer IS NOT DISTINCT FROM :answer END
        FROM cache_namespaces n
        WHERE l.batch_id = :batch_id AND l.seq = :seq AND l.judged_at IS NULL AND n.id = l.namespace_id"""),
        [
            {
                "batch_id": batch_id,
                "seq": one.seq,
                "answer": one.answer,
                "tokens": one.tokens,
                "repeated": one.repeated,
                "checkpoint": checkpoint,
            }
            for one in sorted(verdicts, key=lambda one: one.seq)
        ],
    )


def give_up_lookups(session: Session, batch_id: UUID) -> None:
    """End the lookups that a batch leaves unjudged: an audit without an answer counts as an error, the rest as none."""
    session.execute(
        text("DELETE FROM cache_lookups WHERE batch_id = :batch_id AND judged_at IS NULL AND NOT audited"),
        {"batch_id": batch_id},
    )
    session.execute(
        text("UPDATE cache_lookups SET judged_at = clock_timestamp() WHERE batch_id = :batch_id AND judged_at IS NULL"),
        {"batch_id": batch_id},
    )


def find_answers_of(session: Session, namespace_id: int, ids: Sequence[int]) -> dict[int, str]:
    """What these entries of the namespace answer, as answers are compared; those that may not answer are missing."""
    rows = session.execute(
        text("""
        SELECT u.id, e.answer FROM unnest(CAST(:ids AS int8[])) AS u (id) CROSS JOIN LATERAL (
            SELECT answer FROM cache_entries WHERE id = u.id AND namespace_id = :namespace_id
                AND expires_at > clock_timestamp() AND answer IS NOT NULL OFFSET 0) AS e"""),
        {"ids": list(ids), "namespace_id": namespace_id},
    )
    return {identifier: answer for identifier, answer in rows}


def find_facts(session: Session, namespace_id: int, ids: Sequence[int]) -> dict[int, EntryFacts]:
    """What these entries of the namespace are compared by; those that may not answer are missing."""
    rows = session.execute(
        text("""
        SELECT u.id, e.payload, e.answer FROM unnest(CAST(:ids AS int8[])) AS u (id) CROSS JOIN LATERAL (
            SELECT payload, answer FROM cache_entries WHERE id = u.id AND namespace_id = :namespace_id
                AND expires_at > clock_timestamp() AND payload IS NOT NULL AND answer IS NOT NULL OFFSET 0) AS e"""),
        {"ids": list(ids), "namespace_id": namespace_id},
    )
    return {identifier: EntryFacts(payload, answer) for identifier, payload, answer in rows}


def model_of(session: Session, namespace_id: int) -> bytes | None:
    """What was fitted last."""
    found = session.scalar(text("SELECT model FROM cache_namespaces WHERE id = :id"), {"id": namespace_id})
    return None if found is None else bytes(found)


def begin_fit(session: Session, namespace_id: int, *, lease_s: float) -> str | None:
    """Take the right to fit: the policy to fit for, or None while somebody else fits."""
    found: str | None = session.scalar(
        text("""
        UPDATE cache_namespaces SET fitting_until = clock_timestamp() + make_interval(secs => :lease_s)
        WHERE id = :id AND coalesce(fitting_until < clock_timestamp(), true) RETURNING policy"""),
        {"id": namespace_id, "lease_s": lease_s},
    )
    return found


def fit_samples(session: Session, namespace_id: int, *, version: int, limit: int) -> list[JudgedLookup]:
    """The newest judged lookups of a version that had neighbours, oldest first."""
    rows = session.execute(
        text("""
        SELECT wished, audited, in_shadow, coin, rate, features, agreed, repeated, tokens, version FROM (
            SELECT * FROM cache_lookups WHERE namespace_id = :id AND judged_at IS NOT NULL AND version = :version
                AND features IS NOT NULL AND agreed IS NOT NULL ORDER BY judged_at DESC LIMIT :limit) AS newest
        ORDER BY judged_at, batch_id, seq"""),
        {"id": namespace_id, "version": version, "limit": limit},
    )
    return [JudgedLookup(*row) for row in rows]


def fit_entries(
    session: Session, namespace_id: int, *, limit: int, below: int | None = None
) -> list[tuple[int, str, bytes]]:
    """The newest entries that may answer, with ids below `below`: (id, answer, vector)."""
    rows = session.execute(
        text("""
        SELECT id, answer, vector FROM cache_entries
        WHERE namespace_id = :id AND vector IS NOT NULL AND expires_at > clock_timestamp()
            AND id < coalesce(CAST(:below AS int8), 9223372036854775807)
        ORDER BY id DESC LIMIT :limit"""),
        {"id": namespace_id, "limit": limit, "below": below},
    )
    return [(identifier, answer, bytes(vector)) for identifier, answer, vector in rows]


def entry_count(session: Session, namespace_id: int) -> int:
    """How many entries of a namespace may answer."""
    return int(
        session.execute(
            text("""
        SELECT count(*) FROM cache_entries
        WHERE namespace_id = :id AND vector IS NOT NULL AND expires_at > clock_timestamp()"""),
            {"id": namespace_id},
        ).scalar_one()
    )


def stocked(session: Session, namespaces: Collection[int], *, least: int) -> set[int]:
    """Those of these namespaces that have at least so many entries, be it that some of them may not answer."""
    return set(
        session.scalars(
            # A range and an order that only one index has: statistics may say that any row of the table would do.
            text("""
        SELECT u.id FROM unnest(CAST(:ids AS int8[])) AS u (id) CROSS JOIN LATERAL (
            SELECT FROM cache_entries WHERE namespace_id BETWEEN u.id AND u.id
            ORDER BY namespace_id, id OFFSET :least - 1 LIMIT 1) AS e"""),
            {"ids": list(namespaces), "least": least},
        )
    )


def store_fit(session: Session, namespace_id: int, *, policy: str, model: bytes) -> None:
    """Keep a new model and the policy that adopted it; the namespace is held."""
    session.execute(
        text("""
        UPDATE cache_namespaces SET policy = :policy, model = :model, fit = fit + 1, fitting_until = NULL
        WHERE id = :id"""),
        {"id": namespace_id, "policy": policy, "model": model},
    )


def end_fit(session: Session, namespace_id: int) -> None:
    """Let others fit, after one that came to nothing."""
    session.execute(text("UPDATE cache_namespaces SET fitting_until = NULL WHERE id = :id"), {"id": namespace_id})


def delete_idle(session: Session, *, idle_s: float) -> list[bytes]:
    """Delete some namespaces without an entry and, for so long, a lookup: their secrets, which name their collections.

    One with a time to live of its own stays until it is cleared: the next of its key would not know of it.
    """
    gone = session.scalars(
        text("""
        DELETE FROM cache_namespaces WHERE id IN (
            SELECT id FROM cache_namespaces n WHERE ttl_s IS NULL
                AND used_at < clock_timestamp() - make_interval(secs => :idle_s)
                AND NOT EXISTS (SELECT FROM cache_entries WHERE namespace_id = n.id)
            ORDER BY used_at LIMIT :limit FOR UPDATE SKIP LOCKED)
        RETURNING secret"""),
        {"idle_s": idle_s, "limit": IDLE_AT_ONCE},
    )
    return [bytes(secret) for secret in gone]
