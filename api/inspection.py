"""/v1/stoker/…: what the page reads beside files and batches. It must not change anything."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Final
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request

from api.auth import Admin, KeyedRoute, Reader
from api.cost_objects import CostReportObject
from api.errors import refusals
from api.gateway import gateway_of
from api.inspected import (
    All,
    BatchDetails,
    BudgetObject,
    DeliveryObject,
    JobDetails,
    JobList,
    LookedThrough,
    Me,
    NamespaceList,
    NamespaceObject,
    WorkerObject,
    batch_details,
    budget_objects,
    delivery_object,
    job_details,
    job_list,
    worker_object,
)
from api.objects import BATCH_ID, BatchId
from api.remembered import Remembered
from models.names import batch_hex
from models.states import Scope
from pipeline.cost_figures import figures_of as cost_figures
from pipeline.costs import Group, cost_report
from pipeline.ledger import ledger_of_batch, ledger_since
from pipeline.namespace_figures import bounds_of, certificates, figures_of
from runtime.clock import utc_now
from store.batches import batch_progress
from store.budget_tables import MONEY, TOKENS
from store.cache_reports import namespace_reports
from store.deliveries import deliveries_of
from store.inspection import Wanted, course_of, engines_seen, failures_of, jobs_page, whole_job
from store.results import waiting_jobs

if TYPE_CHECKING:
    from pipeline.certify import Certified

router = APIRouter(prefix="/v1/stoker", tags=["stoker"], route_class=KeyedRoute)

MOST_LISTED: Final = 200
MOST_DAYS: Final = 3_650
MOST_LINES: Final = 2_147_483_647
_LOOKED_THROUGH: Final = Remembered[LookedThrough](most=256)


@router.get("/me", responses=refusals())
def who_asks(principal: Reader) -> Me:
    """Whose key it is, and what it may do."""
    return Me(
        tenant=principal.tenant,
        key=principal.key_id,
        name=principal.name,
        scopes=sorted(principal.scopes),
        expires_at=None if principal.expires_at is None else int(principal.expires_at.timestamp()),
        version=importlib.metadata.version("stoker"),
    )


@router.get("/batches/{batch_id}", responses=refusals(400, 404))
def inspect_batch(request: Request, principal: Reader, batch_id: BatchId) -> BatchDetails:
    """One batch: errors by kind, its states by time, results over time, budgets, webhooks, engines, what waits."""
    identifier, tenant = _read(batch_id), principal.tenant
    gateway = gateway_of(request)
    with gateway.database.transaction() as session:
        progress = batch_progress(session, identifier, tenant=tenant)
        seen = _LOOKED_THROUGH.of(
            identifier,
            (progress.state, progress.done, progress.failed),
            lambda: LookedThrough(
                failures=failures_of(session, identifier, tenant=tenant),
                course=course_of(session, identifier, tenant=tenant),
                engines=engines_seen(session, identifier, tenant=tenant),
            ),
        )
        return batch_details(
            progress,
            seen,
            budgets=budget_objects(
                TOKENS.of_batch(session, identifier),
                MONEY.of_batch(session, identifier),
                currency=gateway.settings.cost.currency,
            ),
            deliveries=deliveries_of(session, tenant=tenant, batch_id=identifier),
            waiting=waiting_jobs(session, identifier),
        )


@router.get("/batches/{batch_id}/jobs", responses=refusals(400, 404))
def list_jobs(
    request: Request,
    principal: Reader,
    batch_id: BatchId,
    after: Annotated[int, Query(ge=0, le=MOST_LINES, description="a line")] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 50,
    outcome: Annotated[Wanted | None, Query(description="waiting: without a result")] = None,
) -> JobList:
    """The jobs of a batch by line, from the one after line `after` on."""
    with gateway_of(request).database.transaction() as session:
        return job_list(
            jobs_page(session, _read(batch_id), tenant=principal.tenant, first=after, limit=limit, wanted=outcome)
        )


@router.get("/batches/{batch_id}/jobs/{line}", responses=refusals(400, 404))
def inspect_job(
    request: Request,
    principal: Reader,
    batch_id: BatchId,
    line: Annotated[int, Path(ge=1, le=MOST_LINES, description="counts from 1")],
) -> JobDetails:
    """One job: what was asked, what was answered, and where the answer came from. Long texts are cut."""
    with gateway_of(request).database.transaction() as session:
        job = whole_job(session, _read(batch_id), line - 1, tenant=principal.tenant)
    return job_details(job)


@router.get("/workers", responses=refusals())
def list_workers(request: Request, _principal: Admin) -> All[WorkerObject]:
    """The live workers of all nodes with their engines' readings; they announce themselves every 5 s."""
    return All(data=[worker_object(worker) for worker in gateway_of(request).board.workers(node=None)])


@router.get("/namespaces", responses=refusals())
def list_namespaces(request: Request, principal: Reader) -> NamespaceList:
    """The tenant's namespaces of the semantic cache, with what their certificates say."""
    with gateway_of(request).database.transaction() as session:
        reports = namespace_reports(session, principal.tenant)
    found: Sequence[Certified | None]
    try:
        found, note = certificates(reports), None
    except ImportError as error:
        found = [None] * len(reports)
        note = f"this gateway cannot read certificates: {error.name} is missing; run `make cache` where it runs"
    pairs = zip(reports, found, strict=True)
    return NamespaceList(data=[NamespaceObject(**figures_of(*pair), **bounds_of(*pair)) for pair in pairs], note=note)


@router.get("/budgets", responses=refusals())
def list_budgets(request: Request, principal: Reader) -> All[BudgetObject]:
    """Budgets of tokens and money: of the tenant's keys in their running periods, and of its batches in progress."""
    gateway = gateway_of(request)
    with gateway.database.transaction() as session:
        tokens, nanos = TOKENS.of_tenant(session, principal.tenant), MONEY.of_tenant(session, principal.tenant)
    return All(data=budget_objects(tokens, nanos, currency=gateway.settings.cost.currency))


@router.get("/costs", responses=refusals(400, 404))
def report_costs(
    request: Request,
    principal: Reader,
    by: Annotated[Group, Query(description="what the lines are of")] = Group.BATCH,
    days: Annotated[int, Query(ge=1, le=MOST_DAYS, description="of UTC, today counted in")] = 30,
    batch_id: Annotated[str | None, Query(pattern=BATCH_ID, description="of this batch, whenever it ran")] = None,
) -> CostReportObject:
    """What the tenant's work took and cost, and which is the cheaper way at this load."""
    gateway = gateway_of(request)
    with gateway.database.transaction() as session:
        if batch_id is not None:
            ledger = ledger_of_batch(session, batch_progress(session, _read(batch_id), tenant=principal.tenant).id)
        else:
            since = (utc_now() - timedelta(days=days - 1)).date()
            ledger = ledger_since(session, since, tenant=principal.tenant)
    report = cost_report(ledger, by=by, cost=gateway.settings.cost, shows_use=Scope.ADMIN in principal.scopes)
    return CostReportObject(**cost_figures(report))


@router.get("/deliveries", responses=refusals())
def list_deliveries(request: Request, principal: Reader) -> All[DeliveryObject]:
    """The tenant's last webhooks, newest first, and what became of each."""
    with gateway_of(request).database.transaction() as session:
        return All(data=[delivery_object(row) for row in deliveries_of(session, tenant=principal.tenant)])


def _read(batch_id: str) -> UUID:
    return UUID(batch_hex(batch_id))
