"""Batches that the gateway created: answered at once, validated after, by whichever validator holds their lease.

The fence guards what a validator writes: one that wakes after its lease is over finds it moved, and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import delete, insert, text
from sqlalchemy.orm import Session

from models.rows import Batch, Follower, Job, Shard
from models.states import BatchState, Priority
from runtime.errors import Problem
from store.deliveries import announce_end
from store.notifications import VALIDATE_CHANNEL, wake

EVER: Final = timedelta(days=36_500)


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A batch as the gateway begins it; `request` is its create body, `digest` what makes two creations the same."""

    id: UUID
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    input_name: str
    input_digest: str
    digest: str
    request: Mapping[str, Any]
    window: timedelta
    priority: Priority
    weight: float


@dataclass(frozen=True, slots=True)
class Validating:
    """A batch that a validator holds while its lease lasts; `tries` counts those that did not put it back."""

    id: UUID
    fence: int
    tenant: str
    endpoint: str
    input_file_id: str
    input_name: str
    input_digest: str
    digest: str
    request: dict[str, Any]
    is_cancelled: bool
    tries: int


def begin_request(session: Session, batch: NewRequest) -> None:
    """Begin a batch: validating, held by nobody, visible to its tenant."""
    session.execute(
        insert(Batch).values(
            id=batch.id,
            tenant=batch.tenant,
            state=BatchState.VALIDATING,
            endpoint=batch.endpoint,
            input_name=batch.input_name,
            input_digest=batch.input_digest,
            input_file_id=batch.input_file_id,
            key_id=batch.key_id,
            submit_digest=batch.digest,
            options={},
            request=dict(batch.request),
            priority=batch.priority,
            weight=batch.weight,
            expires_at=text("clock_timestamp() + :window").bindparams(window=batch.window),
        )
    )
    wake(session, VALIDATE_CHANNEL)


def find_request(
    session: Session, *, tenant: str, digest: str, cancelled_too: bool, younger_than: timedelta = EVER
) -> UUID | None:
    """The newest batch of this creation, whatever became of it; one that was cancelled only if so asked."""
    found: UUID | None = session.execute(
        text(
            "SELECT id FROM batches WHERE tenant = :tenant AND submit_digest = :digest AND deleted_at IS NULL "
            "AND (:whatever OR ending IS DISTINCT FROM 'cancelled') "
            "AND created_at > clock_timestamp() - :age ORDER BY id DESC LIMIT 1"
        ),
        {"tenant": tenant, "digest": digest, "age": younger_than, "whatever": cancelled_too},
    ).scalar_one_or_none()
    return found


def request_of(session: Session, batch_id: UUID) -> dict[str, Any] | None:
    """A batch's create body."""
    found: dict[str, Any] | None = session.execute(
        text("SELECT request FROM batches WHERE id = :id"), {"id": batch_id}
    ).scalar_one_or_none()
    return found


def claim_validating(session: Session, *, lease: timedelta) -> Validating | None:
    """Take the oldest batch that waits for a validator or whose validator is gone, with a new fence.

    What an earlier validator stored of it is deleted.
    """
    row = session.execute(
        text("""
        UPDATE batches SET fence = fence + 1, validations = validations + 1, lease_until = clock_timestamp() + :lease
        WHERE id = (
            SELECT id FROM batches WHERE state = 'validating' AND input_file_id IS NOT NULL
              AND (lease_until IS NULL OR lease_until < clock_timestamp())
            ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
        RETURNING id, fence, tenant, endpoint, input_file_id, input_name, input_digest, submit_digest, request,
            ending IS NOT NULL, validations"""),
        {"lease": lease},
    ).one_or_none()
    if row is None:
        return None
    held = Validating(*row)
    if held.fence > 1:
        _clear(session, held.id)
    return held


def put_back(session: Session, held: Validating, *, wait: timedelta, is_tried: bool) -> None:
    """Let the batch be taken again after a while; `is_tried`: this was a try. Nothing if the fence has moved."""
    session.execute(
        text(
            "UPDATE batches SET lease_until = clock_timestamp() + :wait, validations = validations - :less "
            "WHERE id = :id AND fence = :fence AND state = 'validating'"
        ),
        {"id": held.id, "fence": held.fence, "wait": wait, "less": 0 if is_tried else 1},
    )


def refuse(session: Session, held: Validating, problems: Sequence[Problem]) -> bool:
    """Validating → failed, with why; its jobs go. False if the fence has moved."""
    listed = json.dumps([problem.members() for problem in problems])
    return _end(session, held, BatchState.FAILED, problems=listed)


def end_cancelled(session: Session, held: Validating) -> bool:
    """Validating → cancelled; its jobs go. False if the fence has moved."""
    return _end(session, held, BatchState.CANCELLED, problems=None)


def _end(session: Session, held: Validating, state: BatchState, *, problems: str | None) -> bool:
    ended = session.execute(
        text("""
        UPDATE batches SET state = :state, ending = :state, problems = CAST(:problems AS jsonb), lease_until = NULL,
            ended_at = clock_timestamp()
        WHERE id = :id AND fence = :fence AND state = 'validating' RETURNING 1"""),
        {"id": held.id, "fence": held.fence, "state": state.value, "problems": problems},
    ).scalar_one_or_none()
    if ended is None:
        return False
    _clear(session, held.id)
    announce_end(session, held.id)
    return True


def _clear(session: Session, batch_id: UUID) -> None:
    for table in (Job, Follower, Shard):
        session.execute(delete(table).where(table.batch_id == batch_id))


def waiting_s(session: Session) -> float | None:
    """How long the oldest batch that no validator holds has waited; None if none waits."""
    found: float | None = session.execute(
        text(
            "SELECT CAST(extract(epoch FROM clock_timestamp() - min(created_at)) AS float8) FROM batches "
            "WHERE state = 'validating' AND input_file_id IS NOT NULL "
            "AND (lease_until IS NULL OR lease_until < clock_timestamp())"
        )
    ).scalar_one_or_none()
    return found
