"""SQL of the exact cache: answers by key, and the epochs that make answers old. Postgres is its truth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.orm import Session

from models.jobs import CachedAnswer

EXPIRED_AT_ONCE: Final = 2_000
TENANT_SCOPE: Final = "tenant"


def checkpoint_scope(checkpoint: str) -> str:
    """The scope of all answers of a checkpoint."""
    return f"checkpoint:{checkpoint}"


def template_scope(template: str) -> str:
    """The scope of all answers to one template."""
    return f"template:{hashlib.sha256(template.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class NewAnswer:
    """An engine's answer to keep, and the job that it was given to.

    One with a namespace may answer for other payloads; without `answer`, its comparable form, it is never served so.
    """

    key: bytes
    seq: int
    response: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int
    ttl_s: float
    namespace_id: int | None = None
    payload: str | None = None
    answer: str | None = None
    vector: bytes | None = None
    sources: tuple[str, ...] = ()


def epochs_of(session: Session, tenant: str, scopes: Sequence[str]) -> tuple[int, ...]:
    """The epochs of these scopes; answers of an earlier one are never found again."""
    rows = session.execute(
        text("SELECT scope, epoch FROM cache_epochs WHERE tenant = :tenant AND scope = ANY(CAST(:scopes AS text[]))"),
        {"tenant": tenant, "scopes": list(scopes)},
    )
    found = {scope: epoch for scope, epoch in rows}
    return tuple(found.get(scope, 0) for scope in scopes)


def raise_epoch(session: Session, tenant: str, scope: str) -> None:
    """Make all answers of a scope old."""
    session.execute(
        text("""
        INSERT INTO cache_epochs (tenant, scope, epoch) VALUES (:tenant, :scope, 1)
        ON CONFLICT (tenant, scope) DO UPDATE SET epoch = cache_epochs.epoch + 1"""),
        {"tenant": tenant, "scope": scope},
    )


_FOUND = """id, response, status_code, prompt_tokens, completion_tokens,
    CAST(extract(epoch FROM expires_at) AS float8) AS expires_at"""


def find_answers(session: Session, tenant: str, keys: Sequence[bytes]) -> dict[bytes, CachedAnswer]:
    """The answers that there are for these keys and that have not expired."""
    rows = session.execute(
        text(f"""
        SELECT e.* FROM unnest(CAST(:keys AS bytea[])) AS u (key) CROSS JOIN LATERAL (
            SELECT key, {_FOUND} FROM cache_entries
            WHERE tenant = :tenant AND key = u.key AND expires_at > clock_timestamp() OFFSET 0) AS e"""),
        {"tenant": tenant, "keys": list(keys)},
    )
    return {bytes(key): CachedAnswer(*rest) for key, *rest in rows}


def answers_of(session: Session, namespace_id: int, entries: Mapping[int, str]) -> dict[int, CachedAnswer]:
    """The answers of these entries of a namespace, by entry, where they still answer what is said here.

    An entry may have been deleted, or replaced after its time, since it was decided about.
    """
    rows = session.execute(
        text(f"""
        SELECT e.* FROM unnest(CAST(:ids AS int8[]), CAST(:answers AS text[])) AS u (id, said) CROSS JOIN LATERAL (
            SELECT {_FOUND} FROM cache_entries WHERE id = u.id AND namespace_id = :namespace_id
                AND answer = u.said AND expires_at > clock_timestamp() OFFSET 0) AS e"""),
        {"ids": list(entries), "answers": list(entries.values()), "namespace_id": namespace_id},
    )
    return {row[0]: CachedAnswer(*row) for row in rows}


def living(session: Session, tenant: str, entries: Mapping[bytes, int]) -> set[bytes]:
    """Those of these keys whose entry may still answer: what Redis has may be older, even than this database."""
    rows = session.scalars(
        text("""
        SELECT u.key FROM unnest(CAST(:keys AS bytea[]), CAST(:ids AS int8[])) AS u (key, id) CROSS JOIN LATERAL (
            SELECT FROM cache_entries
            WHERE tenant = :tenant AND key = u.key AND id = u.id AND expires_at > clock_timestamp() OFFSET 0) AS e"""),
        {"tenant": tenant, "keys": list(entries), "ids": list(entries.values())},
    )
    return {bytes(key) for key in rows}


def add_sources(session: Session, tenant: str, sources: Mapping[int, Sequence[str]]) -> None:
    """Note what the prompts were made from that these entries have served, too."""
    pairs = [
        {"tenant": tenant, "source": source, "entry": entry} for entry, names in sources.items() for source in names
    ]
    if pairs:
        session.execute(
            text("""
            INSERT INTO cache_sources (tenant, source, entry_id)
            SELECT :tenant, :source, id FROM cache_entries WHERE id = :entry ON CONFLICT DO NOTHING"""),
            pairs,
        )


_KEEP: TextClause = text("""
    INSERT INTO cache_entries (tenant, batch_id, key, seq, response, status_code, prompt_tokens, completion_tokens,
        expires_at, namespace_id, payload, answer, vector)
    SELECT :tenant, :batch_id, u.key, u.seq, u.response, u.status_code, u.prompt_tokens, u.completion_tokens,
        clock_timestamp() + make_interval(secs => u.ttl_s), u.namespace_id, u.payload, u.answer, u.vector
    FROM unnest(CAST(:keys AS bytea[]), CAST(:seqs AS int4[]), CAST(:responses AS text[]),
        CAST(:status_codes AS int2[]), CAST(:prompt_tokens AS int4[]), CAST(:completion_tokens AS int4[]),
        CAST(:ttls AS float8[]), CAST(:namespaces AS int8[]), CAST(:payloads AS text[]), CAST(:answers AS text[]),
        CAST(:vectors AS bytea[]))
        AS u (key, seq, response, status_code, prompt_tokens, completion_tokens, ttl_s, namespace_id, payload, answer,
            vector)
    ORDER BY u.key
    ON CONFLICT (tenant, key) DO UPDATE SET response = excluded.response, status_code = excluded.status_code,
        prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens,
        batch_id = excluded.batch_id, seq = excluded.seq, created_at = clock_timestamp(),
        expires_at = excluded.expires_at, namespace_id = excluded.namespace_id, payload = excluded.payload,
        answer = excluded.answer, vector = excluded.vector
    WHERE cache_entries.expires_at <= clock_timestamp()
    RETURNING key, id, CAST(extract(epoch FROM expires_at) AS float8)""")


def keep_answers(
    session: Session, tenant: str, batch_id: UUID, answers: Sequence[NewAnswer]
) -> dict[bytes, CachedAnswer]:
    """Keep answers under their keys, unless one is there that has not expired: those that were kept."""
    rows = session.execute(
        _KEEP,
        {
            "tenant": tenant,
            "batch_id": batch_id,
            "keys": [answer.key for answer in answers],
            "seqs": [answer.seq for answer in answers],
            "responses": [answer.response for answer in answers],
            "status_codes": [answer.status_code for answer in answers],
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "completion_tokens": [answer.completion_tokens for answer in answers],
            "ttls": [answer.ttl_s for answer in answers],
            "namespaces": [answer.namespace_id for answer in answers],
            "payloads": [answer.payload for answer in answers],
            "answers": [answer.answer for answer in answers],
            "vectors": [answer.vector for answer in answers],
        },
    )
    new = {answer.key: answer for answer in answers}
    kept = {bytes(key): _cached(new[bytes(key)], entry, expires_at) for key, entry, expires_at in rows}
    add_sources(session, tenant, {kept[one.key].entry: one.sources for one in answers if one.key in kept})
    return kept


def _cached(new: NewAnswer, entry: int, expires_at: float) -> CachedAnswer:
    return CachedAnswer(
        entry, new.response, new.status_code, new.prompt_tokens, new.completion_tokens, expires_at=expires_at
    )


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
