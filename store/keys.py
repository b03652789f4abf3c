"""SQL of keys. What is stored of a secret is its digest; the clock that ends a key is Postgres's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from models.states import Scope

USED_WITHIN: Final = timedelta(minutes=1)  # how exactly the last use is known: one write in it a key

_LIVING: Final = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key to be created."""

    id: str
    tenant: str
    name: str
    digest: bytes
    scopes: tuple[Scope, ...]
    requests_per_minute: int | None = None
    expires_in: timedelta | None = None


@dataclass(frozen=True, slots=True)
class LivingKey:
    """A key that is neither revoked nor expired, as a request is held to it.

    `digests` are of the secrets that hold now: a second one while a rotation's grace lasts. `is_fresh`: its last use is
    known to the minute.
    """

    id: str
    tenant: str
    name: str
    digests: tuple[bytes, ...]
    scopes: frozenset[Scope]
    requests_per_minute: int | None
    expires_at: datetime | None
    is_fresh: bool


@dataclass(frozen=True, slots=True)
class KeyReport:
    """A key as it is listed; `state` is living, rotating, expired or revoked."""

    id: str
    tenant: str
    name: str
    state: str
    scopes: tuple[Scope, ...]
    requests_per_minute: int | None
    day_tokens: int | None
    month_tokens: int | None
    day_money: int | None  # nanos
    month_money: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    previous_until: datetime | None
    last_used_at: datetime | None


def create_key(session: Session, new: NewKey) -> datetime | None:
    """Store a key. Returns when it expires."""
    found: datetime | None = session.execute(
        text("""
        INSERT INTO api_keys (id, tenant, name, digest, scopes, requests_per_minute, expires_at)
        VALUES (:id, :tenant, :name, :digest, :scopes, :requests, clock_timestamp() + :expires_in)
        RETURNING expires_at"""),
        {
            "id": new.id,
            "tenant": new.tenant,
            "name": new.name,
            "digest": new.digest,
            "scopes": [scope.value for scope in new.scopes],
            "requests": new.requests_per_minute,
            "expires_in": new.expires_in,
        },
    ).scalar_one()
    return found


def living_key(session: Session, key_id: str) -> LivingKey | None:
    """The key of this id, if it is neither revoked nor expired."""
    row = session.execute(
        text(f"""
        SELECT id, tenant, name, digest, scopes, requests_per_minute, expires_at,
            CASE WHEN previous_until > clock_timestamp() THEN previous_digest END AS previous,
            coalesce(last_used_at > clock_timestamp() - :within, false) AS is_fresh
        FROM api_keys WHERE id = :id AND {_LIVING}"""),
        {"id": key_id, "within": USED_WITHIN},
    ).one_or_none()
    if row is None:
        return None
    return LivingKey(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        digests=(row.digest,) if row.previous is None else (row.digest, row.previous),
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        requests_per_minute=row.requests_per_minute,
        expires_at=row.expires_at,
        is_fresh=row.is_fresh,
    )


def touch_key(session: Session, key_id: str) -> None:
    """Note that a key was used, unless that was noted within the minute. Waits for nobody: another notes the same."""
    session.execute(
        text("""
        UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id = (
            SELECT id FROM api_keys
            WHERE id = :id AND (last_used_at IS NULL OR last_used_at <= clock_timestamp() - :within)
            FOR NO KEY UPDATE SKIP LOCKED)"""),
        {"id": key_id, "within": USED_WITHIN},
    )


def list_keys(session: Session, *, tenant: str | None) -> list[KeyReport]:
    """The keys of a tenant, or of all; the newest last."""
    rows = session.execute(
        text(f"{_REPORT} WHERE tenant = coalesce(:tenant, tenant) ORDER BY tenant, created_at, id"), {"tenant": tenant}
    )
    return [_report(row) for row in rows]


def named_keys(session: Session, name: str) -> list[KeyReport]:
    """The keys, of any tenant, that may be meant: of this id; else those whose id begins so or that have this name.

    A revoked key is found by its id only.
    """
    rows = session.execute(
        text(f"""
        {_REPORT} WHERE starts_with(id, :name) OR (name = :name AND revoked_at IS NULL)
        ORDER BY created_at, id"""),
        {"name": name},
    )
    found = [_report(row) for row in rows]
    return [key for key in found if key.id == name] or found


def has_living_key(session: Session, tenant: str) -> bool:
    """Whether a tenant has a key that is neither revoked nor expired."""
    return bool(
        session.execute(
            text(f"SELECT EXISTS (SELECT FROM api_keys WHERE tenant = :tenant AND {_LIVING})"), {"tenant": tenant}
        ).scalar_one()
    )


def lock_first_key(session: Session, tenant: str) -> None:
    """Keep others from making a tenant's first key until the transaction ends."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('first key of ' || :t, 0))"), {"t": tenant})


def revoke_key(session: Session, key_id: str) -> bool:
    """End a key for good. False if it was revoked before, or never was."""
    return _changed(
        session, "UPDATE api_keys SET revoked_at = clock_timestamp() WHERE id = :id AND revoked_at IS NULL", key_id
    )


def rotate_key(session: Session, key_id: str, *, digest: bytes, grace: timedelta) -> bool:
    """Give a living key a new secret; the one before holds until the grace is over, an earlier one no more.

    False, and nothing changed, if the key is revoked or expired.
    """
    return _changed(
        session,
        f"""
        UPDATE api_keys SET previous_digest = digest, previous_until = clock_timestamp() + :grace, digest = :digest
        WHERE id = :id AND {_LIVING}""",
        key_id,
        digest=digest,
        grace=grace,
    )


def name_key(session: Session, key_id: str, name: str) -> bool:
    """Name a key otherwise. False if there is none."""
    return _changed(session, "UPDATE api_keys SET name = :name WHERE id = :id", key_id, name=name)


def set_key_expiry(session: Session, key_id: str, expires_in: timedelta | None) -> bool:
    """Let a key expire after a time from now, or never. False if there is none."""
    statement = "UPDATE api_keys SET expires_at = clock_timestamp() + :expires_in WHERE id = :id"
    return _changed(session, statement, key_id, expires_in=expires_in)


def set_key_rate(session: Session, key_id: str, requests_per_minute: int | None) -> bool:
    """Hold a key to requests a minute, or to the setting's. False if there is none."""
    statement = "UPDATE api_keys SET requests_per_minute = :requests WHERE id = :id"
    return _changed(session, statement, key_id, requests=requests_per_minute)


_REPORT: Final = f"""
    SELECT id, tenant, name, scopes, requests_per_minute, day_tokens, month_tokens, day_money, month_money,
        created_at, expires_at, revoked_at, last_used_at,
        CASE WHEN {_LIVING} AND previous_until > clock_timestamp() THEN previous_until END AS until,
        CASE WHEN revoked_at IS NOT NULL THEN 'revoked' WHEN NOT ({_LIVING}) THEN 'expired'
            WHEN previous_until > clock_timestamp() THEN 'rotating' ELSE 'living' END AS state
    FROM api_keys"""


def _report(row: Row[Any]) -> KeyReport:
    return KeyReport(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        state=row.state,
        scopes=_ordered(row.scopes),
        requests_per_minute=row.requests_per_minute,
        day_tokens=row.day_tokens,
        month_tokens=row.month_tokens,
        day_money=row.day_money,
        month_money=row.month_money,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        previous_until=row.until,
        last_used_at=row.last_used_at,
    )


def _ordered(scopes: Sequence[str]) -> tuple[Scope, ...]:
    return tuple(scope for scope in Scope if scope in scopes)


def _changed(session: Session, statement: str, key_id: str, **values: object) -> bool:
    return session.execute(text(statement + " RETURNING id"), {"id": key_id, **values}).first() is not None
