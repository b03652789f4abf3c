"""The spans of a batch that are begun in one place and end in another: its shards' attempts, and its own."""

from __future__ import annotations

from contextvars import Context
from datetime import datetime
from uuid import UUID

from models.states import BatchState
from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from runtime.tracing import SHARD_ID, Span, Value, context_of, is_traced, own_trace, record_root
from store.database import Database
from store.shards import Claim
from store.traced import totals_of

log = get_logger(__name__)

_FAILED = frozenset({BatchState.FAILED.value, BatchState.EXPIRED.value})


def shard_traced(claim: Claim, *, jobs: int) -> tuple[Span, Context]:
    """The span of a shard's attempt, which begins now, and the context of all that is done in it."""
    attributes: dict[str, Value] = {
        SHARD_ID: claim.shard_id,
        "stoker.fence": claim.fence,
        "stoker.jobs": jobs,
        "stoker.path": claim.endpoint,
    }
    span = own_trace("shard", claim.batch_id, attributes=attributes).begin()
    return span, context_of(span, batch_id=str(claim.batch_id), shard_id=claim.shard_id, fence=claim.fence)


def end_shard(span: Span, *, is_lost: bool) -> None:
    """The attempt is over; lost, if another one owns the shard or nobody does."""
    if is_lost:
        span.fail("lost", "its fence was lost, or the worker's task ended by a defect")
    span.end()


def trace_end(database: Database, batch_id: UUID) -> None:
    """Write the batch's own span, if it has ended and is traced. It costs the batch nothing when that fails."""
    if not is_traced(batch_id):
        return
    try:
        with database.transaction() as session:
            totals = totals_of(session, batch_id)
    except ServiceUnreachable as error:
        log.warning("batch_not_traced", batch_id=str(batch_id), error=str(error))
        return
    if totals is None:
        return
    attributes: dict[str, Value] = {
        "stoker.state": totals.state,
        "stoker.path": totals.endpoint,
        "stoker.jobs": totals.total,
        **{f"stoker.jobs.{name}": count for name, count in totals.outcomes.items()},
        "gen_ai.usage.input_tokens": totals.prompt_tokens,
        "gen_ai.usage.output_tokens": totals.completion_tokens,
    }
    record_root(
        batch_id,
        started_ns=_nanos(totals.created_at),
        ended_ns=_nanos(totals.ended_at),
        attributes=attributes,
        error=totals.state if totals.state in _FAILED else None,
    )


def _nanos(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1_000
