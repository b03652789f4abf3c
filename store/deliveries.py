"""Webhooks that tell of a batch's end: written with the end, taken by lease, recorded; and what they are signed with.

It must not send: who takes a delivery sends it outside any transaction, and records what came of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import DeliveryState

SECRET_BYTES: Final = 32
PREVIOUS_SECRET_HOURS: Final = 24  # after a rotation: time to tell every receiver of the new one


@dataclass(frozen=True, slots=True)
class TakenDelivery:
    """A delivery to be sent now. `tries` counts this one; it tells who took it from who had it before."""

    id: UUID
    tenant: str
    batch_id: UUID
    url: str
    event: str
    tries: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one try; `wait` until the next one where the delivery is still pending."""

    state: DeliveryState
    status_code: int | None = None
    error: str | None = None
    wait: timedelta = timedelta()


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """A delivery as its tenant sees it; `status_code` and `error` are of its last try."""

    id: UUID
    batch_id: UUID
    url: str
    event: str
    state: DeliveryState
    tries: int
    status_code: int | None
    error: str | None
    created_at: datetime
    next_at: datetime
    ended_at: datetime | None


def announce_end(session: Session, batch_id: UUID) -> None:
    """Add the delivery of an ended batch whose creation named a webhook; once, however often it is called.

    In the transaction that ends the batch, after its state is set.
    """
    session.execute(
        text("""
        INSERT INTO deliveries (tenant, batch_id, url, event)
        SELECT tenant, id, request -> 'stoker' -> 'webhook' ->> 'url', 'batch.' || state FROM batches
        WHERE id = :id AND request -> 'stoker' -> 'webhook' ->> 'url' IS NOT NULL
          AND state IN ('completed', 'failed', 'expired', 'cancelled')
        ON CONFLICT (batch_id) DO NOTHING"""),
        {"id": batch_id},
    )


def take_due(
    session: Session, *, limit: int, lease: timedelta, per_tenant: int, without: Sequence[str] = ()
) -> list[TakenDelivery]:
    """Take deliveries that are due; each is due again after `lease` unless what became of it was recorded.

    At most `per_tenant` of each tenant, the tenants in turn, none of those in `without`. Who takes at the same moment
    gets others or none.
    """
    rows = session.execute(
        text("""
        UPDATE deliveries d SET tries = d.tries + 1, next_at = clock_timestamp() + :lease FROM (
            SELECT id FROM deliveries WHERE state = 'pending' AND next_at <= now() AND id IN (
                SELECT id FROM (
                    SELECT id, next_at, row_number() OVER (PARTITION BY tenant ORDER BY next_at, id) AS place
                    FROM deliveries
                    WHERE state = 'pending' AND next_at <= now() AND tenant <> ALL(CAST(:without AS text[]))) AS due
                WHERE place <= :per_tenant ORDER BY place, next_at LIMIT :limit)
            FOR UPDATE SKIP LOCKED) AS free
        WHERE d.id = free.id RETURNING d.id, d.tenant, d.batch_id, d.url, d.event, d.tries, d.created_at"""),
        {"lease": lease, "without": list(without), "per_tenant": per_tenant, "limit": limit},
    )
    return [TakenDelivery(*row) for row in rows]


def record(session: Session, taken: TakenDelivery, tried: Tried) -> None:
    """Write what became of a try. If another has taken the delivery since, only its arrival is still news."""
    session.execute(
        text("""
        UPDATE deliveries SET state = :state, status_code = :status_code, error = :error,
            next_at = clock_timestamp() + :wait,
            ended_at = CASE WHEN :state <> 'pending' THEN clock_timestamp() END
        WHERE id = :id AND state = 'pending' AND (tries = :tries OR :state = 'delivered')"""),
        {
            "id": taken.id,
            "tries": taken.tries,
            "state": tried.state.value,
            "status_code": tried.status_code,
            "error": tried.error,
            "wait": tried.wait,
        },
    )


def deliveries_of(
    session: Session, *, tenant: str, batch_id: UUID | None = None, limit: int = 100
) -> list[DeliveryRow]:
    """The tenant's deliveries, or those of one batch, newest first."""
    rows = session.execute(
        text("""
        SELECT id, batch_id, url, event, state, tries, status_code, error, created_at, next_at, ended_at
        FROM deliveries WHERE tenant = :tenant AND (CAST(:batch AS uuid) IS NULL OR batch_id = :batch)
        ORDER BY created_at DESC, id LIMIT :limit"""),
        {"tenant": tenant, "batch": batch_id, "limit": limit},
    )
    return [
        DeliveryRow(identifier, batch, url, event, DeliveryState(state), *rest)
        for identifier, batch, url, event, state, *rest in rows
    ]


def webhook_secret(session: Session, tenant: str) -> bytes:
    """What the tenant's webhooks are signed with, made at first use."""
    return signing_secrets(session, tenant)[0]


def signing_secrets(session: Session, tenant: str) -> list[bytes]:
    """The tenant's secret, made at first use, and the one before while that still holds."""
    session.execute(
        text("INSERT INTO webhook_secrets (tenant, secret) VALUES (:tenant, :secret) ON CONFLICT (tenant) DO NOTHING"),
        {"tenant": tenant, "secret": secrets.token_bytes(SECRET_BYTES)},
    )
    secret, previous = session.execute(
        text("""
        SELECT secret, CASE WHEN previous_until > clock_timestamp() THEN previous END FROM webhook_secrets
        WHERE tenant = :tenant"""),
        {"tenant": tenant},
    ).one()
    return [bytes(secret)] if previous is None else [bytes(secret), bytes(previous)]


def rotate_secret(session: Session, tenant: str) -> bytes:
    """A new secret for the tenant; the one before signs too for a day."""
    secret = secrets.token_bytes(SECRET_BYTES)
    session.execute(
        text("""
        INSERT INTO webhook_secrets AS w (tenant, secret) VALUES (:tenant, :secret)
        ON CONFLICT (tenant) DO UPDATE SET secret = excluded.secret, created_at = clock_timestamp(),
            previous = w.secret, previous_until = clock_timestamp() + make_interval(hours => :hours)"""),
        {"tenant": tenant, "secret": secret, "hours": PREVIOUS_SECRET_HOURS},
    )
    return secret
