"""The way of a new batch from validating to in progress, whatever fills it: lease, last step, same submit.

Until the last transaction nothing else sees the batch; it must not leave rows of one that was not set going.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from models.names import short_name
from runtime.errors import BadInput, StokerError
from runtime.tracing import batch_span
from store.database import Database
from store.submissions import (
    Filled,
    NewBatch,
    SameSubmit,
    delete_validating,
    find_same_submit,
    insert_validating,
    lock_submit,
    set_going,
)

TENANT = "local"
CHUNK_JOBS = 50_000  # in one transaction
LEASE = timedelta(minutes=5)  # must outlast the check of all ids before the last step: seconds at 10,000,000
REUSE_FOR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The batch that runs the jobs. `reused`: it is an earlier one, nothing new was stored.

    `skipped` counts bad lines that were left out, `taken` jobs whose results came from another batch, `followers` those
    that take an equal one's. `notices` are what the submitter should know before it runs.
    """

    batch_id: UUID
    total: int
    reused: bool
    skipped: int = 0
    taken: int = 0
    followers: int = 0
    notices: tuple[str, ...] = ()


def same_submit(database: Database, *, tenant: str, submit_digest: str, asked: str | None = None) -> Submitted | None:
    """The batch of the same submit within the hour, while it runs or if it was completed; the batch of a key always.

    Raises BadInput if a key's batch was made of anything else than what is `asked` now.
    """
    with database.transaction() as session:
        earlier = find_same_submit(session, tenant=tenant, submit_digest=submit_digest, younger_than=REUSE_FOR)
    return None if earlier is None else _earlier(earlier, asked=asked)


def begin_batch(
    database: Database, batch: NewBatch, fill: Callable[[], Filled], *, window: timedelta, reuse: bool
) -> Submitted:
    """Begin the batch, let `fill` store its jobs and shards, and set it going.

    `fill` must extend the lease in each of its transactions. With `reuse`, if the same submit was quicker, its
    batch is the answer. Any error, Ctrl-C included, deletes what was stored; after a kill the leader does.
    """
    with batch_span("submit", batch.id) as span:
        try:
            with database.transaction() as session:
                insert_validating(session, batch, lease=LEASE)
            submitted = _set_going(database, batch, fill(), window=window, reuse=reuse)
        except BaseException:
            _delete(database, batch.id)
            raise
        span.set({"stoker.jobs": submitted.total, "stoker.skipped": submitted.skipped})
    return submitted


def _set_going(database: Database, batch: NewBatch, filled: Filled, *, window: timedelta, reuse: bool) -> Submitted:
    """The last transaction. If the same submit was quicker, its batch is the answer and ours is deleted."""
    with database.transaction() as session:
        earlier = None
        if reuse:
            lock_submit(session, tenant=batch.tenant, submit_digest=batch.submit_digest)
            earlier = find_same_submit(
                session, tenant=batch.tenant, submit_digest=batch.submit_digest, younger_than=REUSE_FOR
            )
        if earlier is None:
            set_going(session, batch, filled, window=window)
    if earlier is None:
        return Submitted(
            batch.id,
            filled.total,
            reused=False,
            skipped=filled.skipped,
            taken=filled.taken,
            followers=filled.followers,
            notices=filled.notices,
        )
    _delete(database, batch.id)
    return _earlier(earlier, asked=batch.options.get("asked"))


def _earlier(found: SameSubmit, *, asked: str | None) -> Submitted:
    if found.asked != asked:
        raise BadInput(
            f"{short_name(found.id)} was submitted with this idempotency key, but of another file or with other "
            "options; use a new key for another batch"
        )
    return Submitted(
        found.id, found.total, reused=True, skipped=found.skipped, taken=found.taken, followers=found.followers
    )


def _delete(database: Database, batch_id: UUID) -> None:
    """Best effort: what a broken connection leaves is deleted when the lease is over."""
    with suppress(StokerError), database.transaction() as session:
        delete_validating(session, batch_id)
