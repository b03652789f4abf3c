"""/v1/batches, as the batch contract says, and three of ours: retry, resume, and what lies under `stoker`."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Annotated, Final
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request

from api.auth import KeyedRoute, Principal, Reader, Submitter
from api.errors import ApiError, links, refusals
from api.files import listing
from api.gateway import gateway_of
from api.objects import BATCH_ID, BatchId, BatchObject, Listing, batch_object
from models.batch_requests import CreateBatch
from models.money import nanos_of
from models.names import batch_hex
from models.states import Purpose
from pipeline.again import retry_batch
from pipeline.cutting import for_workers
from pipeline.serving import live_workers
from pipeline.webhooks import check_url
from runtime.clock import uuid7
from runtime.errors import BadInput
from runtime.tracing import batch_span
from store.batches import BatchProgress, batch_progress, latest_batches, request_cancel, resume
from store.budgets import open_batch_budget
from store.database import Session
from store.files import FileEntry, find_file
from store.money import open_batch_money
from store.submissions import lock_submit
from store.validating import NewRequest, begin_request, find_request, request_of

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=KeyedRoute)

REPEATED_FOR: Final = timedelta(minutes=10)  # a client that says it repeats itself gets the batch of the first time
KEY_HELD_FOR: Final = timedelta(hours=24)
_LINKS: Final = links(
    retrieve_batch="batch_id",
    cancel_batch="batch_id",
    resume_batch="batch_id",
    retry_failed_lines="batch_id",
)


@router.post("", responses={**_LINKS, **refusals(400, 404, 413, 422)})
def create_batch(
    request: Request,
    principal: Submitter,
    body: CreateBatch,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    x_stainless_retry_count: Annotated[int, Header(ge=0)] = 0,
) -> BatchObject:
    """Begin a batch: answered at once as `validating`; what is wrong with its file turns it `failed`.

    With an Idempotency-Key, or when the client says that it repeats itself, a second creation is the first one.
    """
    gateway = gateway_of(request)
    webhook = body.extras.webhook
    if webhook is not None and (fault := check_url(webhook.url, gateway.settings)):
        raise ApiError(400, fault, param="stoker.webhook.url")
    with gateway.database.transaction() as session:
        if idempotency_key is not None:
            digest = _digest_of(principal, idempotency_key)
            lock_submit(session, tenant=principal.tenant, submit_digest=digest)
            earlier = find_request(
                session, tenant=principal.tenant, digest=digest, younger_than=KEY_HELD_FOR, cancelled_too=True
            )
            if earlier is not None and request_of(session, earlier) != _as_stored(body):
                raise ApiError(
                    422, "this Idempotency-Key was used for another request; use a new one", code="key_reused"
                )
            batch_id = earlier or _begin(session, principal, body, _batch_file(session, principal, body), digest=digest)
        else:
            entry = _batch_file(session, principal, body)
            digest = body.digest(key_id=principal.key_id, file_digest=entry.digest or "")
            lock_submit(session, tenant=principal.tenant, submit_digest=digest)
            earlier = None
            if x_stainless_retry_count > 0:
                earlier = find_request(
                    session, tenant=principal.tenant, digest=digest, younger_than=REPEATED_FOR, cancelled_too=False
                )
            batch_id = earlier or _begin(session, principal, body, entry, digest=digest)
        return batch_object(batch_progress(session, batch_id, tenant=principal.tenant))


@router.get("", responses=refusals(400, 404))
def list_all_batches(
    request: Request,
    principal: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=BATCH_ID)] = None,
    idempotency_key: Annotated[str | None, Query(min_length=1, max_length=255)] = None,
) -> Listing[BatchObject]:
    """The tenant's batches, newest first; `after` is a batch's id.

    With `idempotency_key` the newest one that this key created with it, at any time: at most one.
    """
    with gateway_of(request).database.transaction() as session:
        if idempotency_key is not None:
            digest = _digest_of(principal, idempotency_key)
            named = find_request(session, tenant=principal.tenant, digest=digest, cancelled_too=True)
            one = [] if named is None else [batch_progress(session, named, tenant=principal.tenant)]
            return listing([batch_object(progress) for progress in one], has_more=False)
        last = None if after is None else _found(session, after, principal).id
        found = latest_batches(session, tenant=principal.tenant, limit=limit + 1, before=last)
    return listing([batch_object(one) for one in found[:limit]], has_more=len(found) > limit)


@router.get("/{batch_id}", responses=refusals(400, 404))
def retrieve_batch(request: Request, principal: Reader, batch_id: BatchId) -> BatchObject:
    """One batch."""
    with gateway_of(request).database.transaction() as session:
        return batch_object(_found(session, batch_id, principal))


@router.post("/{batch_id}/cancel", responses=refusals(400, 404, 409))
def cancel_batch(request: Request, principal: Submitter, batch_id: BatchId) -> BatchObject:
    """Cancel: nothing new starts, finished jobs keep their results, the others end as batch_cancelled."""
    with gateway_of(request).database.transaction() as session:
        before = _found(session, batch_id, principal)
        request_cancel(session, before.id)
        after = batch_object(_found(session, batch_id, principal))
    if before.is_ended or after.cancelling_at is None:
        raise _ended(f"{batch_id} is {after.status.value} and cannot be cancelled")
    return after


@router.post("/{batch_id}/resume", responses=refusals(400, 404, 409))
def resume_batch(request: Request, principal: Submitter, batch_id: BatchId) -> BatchObject:
    """Let a paused batch go on."""
    with gateway_of(request).database.transaction() as session:
        if not resume(session, _found(session, batch_id, principal).id):
            raise _ended(f"{batch_id} is not paused")
        return batch_object(_found(session, batch_id, principal))


@router.post("/{batch_id}/retry", responses=refusals(400, 404, 409))
def retry_failed_lines(request: Request, principal: Submitter, batch_id: BatchId) -> BatchObject:
    """Run the failed lines of an ended batch again, as a new batch; a second retry within an hour is the first."""
    gateway = gateway_of(request)
    with gateway.database.transaction() as session:
        earlier = _found(session, batch_id, principal)
    if not earlier.is_ended:  # one that is being validated is nobody's yet but here
        raise _ended(f"{batch_id} is {batch_object(earlier).status.value} and cannot be retried; wait for its end")
    try:
        made = retry_batch(
            gateway.database,
            earlier.id,
            settings=for_workers(gateway.settings, live_workers(gateway.board)),
            reuse=True,
            tenant=principal.tenant,
            key_id=principal.key_id,
            request=_again(earlier, window_s=gateway.settings.limits.window_s),
        )
    except BadInput as error:
        raise _ended(str(error)) from error
    with gateway.database.transaction() as session:
        return batch_object(batch_progress(session, made.batch_id, tenant=principal.tenant))


def _begin(session: Session, principal: Principal, body: CreateBatch, entry: FileEntry, *, digest: str) -> UUID:
    batch = NewRequest(
        id=uuid7(),
        tenant=principal.tenant,
        key_id=principal.key_id,
        endpoint=body.endpoint,
        input_file_id=entry.id,
        input_name=entry.filename,
        input_digest=entry.digest or "",
        digest=digest,
        request=_as_stored(body),
        window=body.window,
        priority=body.extras.priority,
        weight=body.extras.weight,
    )
    with batch_span("submit", batch.id, kind="server"):
        begin_request(session, batch)
        if body.extras.budget_tokens is not None:
            open_batch_budget(session, batch.id, body.extras.budget_tokens)
        if body.extras.budget_money is not None:
            open_batch_money(session, batch.id, nanos_of(body.extras.budget_money))
    return batch.id


def _batch_file(session: Session, principal: Principal, body: CreateBatch) -> FileEntry:
    """The upload that the batch is to be made of. Raises ApiError if it is for something else, NotFound."""
    entry = find_file(session, body.input_file_id, tenant=principal.tenant)
    if entry.purpose is not Purpose.BATCH or entry.blob is None:
        raise ApiError(400, f"{entry.id} has the purpose {entry.purpose}; upload it as `batch`", param="input_file_id")
    return entry


def _as_stored(body: CreateBatch) -> dict[str, object]:
    """A create body as its batch keeps it."""
    return body.model_dump(mode="json", exclude_unset=True)


def _digest_of(principal: Principal, idempotency_key: str) -> str:
    return hashlib.sha256(f"{principal.key_id}\n{idempotency_key}".encode()).hexdigest()


def _again(earlier: BatchProgress, *, window_s: float) -> dict[str, object]:
    """What a retry takes over from its batch's create body: not its budgets."""
    asked = dict(earlier.request or {})
    stated = (asked.get("stoker") or {}).items()
    asked["stoker"] = {name: value for name, value in stated if name not in ("budget_tokens", "budget_money")}
    asked["completion_window"] = f"{window_s:.0f}s"
    return asked


def _found(session: Session, name: str, principal: Principal) -> BatchProgress:
    return batch_progress(session, UUID(batch_hex(name)), tenant=principal.tenant)


def _ended(message: str) -> ApiError:
    """The client must not repeat a request that can never succeed."""
    return ApiError(409, message, code="wrong_state", headers={"x-should-retry": "false"})
