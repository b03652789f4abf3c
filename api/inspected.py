"""What /v1/stoker/… answers: the members of its objects, and how they are made from rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from api.objects import BatchObject, batch_object
from api.shortened import Shortener
from models.money import money
from models.names import batch_name
from models.states import BudgetPeriod, DeliveryState, Outcome, Scope, Source
from store.batches import BatchProgress
from store.budget_tables import BudgetReport
from store.deliveries import DeliveryRow
from store.inspection import Bucket, FailureKind, Failures, JobLine, JobPage, WholeJob
from store.presence import WorkerPresence
from store.results import WaitingJobs

Member = TypeVar("Member", bound=BaseModel)


class All(BaseModel, Generic[Member]):
    """A list that has no pages."""

    object: Literal["list"] = "list"
    data: list[Member]


class Me(BaseModel):
    """Whose key this is, and the gateway's version."""

    tenant: str
    key: str
    name: str
    scopes: list[Scope]
    expires_at: int | None
    version: str


class ErrorKindObject(BaseModel):
    """Failed jobs of one kind; `message` is that of one of them."""

    code: str
    count: int
    message: str | None


class Mark(BaseModel):
    """When the batch came to a state."""

    name: Literal["created", "in_progress", "cancelling", "finalizing", "ended"]
    at: float


class FinishedObject(BaseModel):
    """Jobs that ended in the stretch of time that ends at `at`; all stretches of a batch are equally long."""

    at: float
    jobs: int
    failed: int


class BudgetObject(BaseModel):
    """What a key may take in a period, or a batch at all: of tokens, or of money at priced endpoints."""

    unit: str = Field(description="tokens, or the currency that the amounts are in")

    key: str | None
    key_name: str | None
    batch: str | None
    period: BudgetPeriod
    began_at: float
    cap: int | float
    spent: int | float
    reserved: int | float


class DeliveryObject(BaseModel):
    """A webhook that tells of a batch's end; `status_code` and `error` are of its last try."""

    id: str
    batch: str
    url: str
    event: str
    state: DeliveryState
    tries: int
    status_code: int | None
    error: str | None
    created_at: float
    next_at: float | None
    ended_at: float | None


class WaitingObject(BaseModel):
    """Jobs that failed transiently and wait for another try."""

    jobs: int
    tries: int
    next_in_s: float
    last_error: str


class BatchDetails(BaseModel):
    """A batch with what its page shows."""

    batch: BatchObject
    errors: list[ErrorKindObject]
    errors_complete: bool = Field(description="false: only some of the failed jobs are counted in `errors`")
    marks: list[Mark]
    finished: list[FinishedObject]
    budgets: list[BudgetObject]
    deliveries: list[DeliveryObject]
    engines: list[dict[str, Any]]
    waiting: WaitingObject | None


class JobObject(BaseModel):
    """A job in a list; without an outcome it has no result yet. `line` counts from 1."""

    line: int
    custom_id: str
    outcome: Outcome | None
    source: Source | None
    status_code: int | None
    error_code: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    duration_ms: int | None
    ended_at: float | None


class JobList(BaseModel):
    """One page of jobs by line. The next one is had by `after=next_after`; a page of rare jobs may be short."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool
    next_after: int | None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str | None


class JobDetails(JobObject):
    """One job with its request and its answer."""

    request: dict[str, Any] = Field(
        description="the body that is sent to the engine; of one with very many values only its first `text`"
    )
    settings: Any = Field(description="the line's own `stoker` object")
    response: Any = Field(description="as the engine sent it")
    error: JobError | None
    similarity: float | None
    stoker: dict[str, Any] | None = Field(
        description="what the result line has under `stoker` beyond outcome and source"
    )
    truncated: bool = Field(description="whether long texts or lists are cut; the batch's files have them whole")


class WorkerObject(BaseModel):
    """A live worker and its engine's readings; null where nothing is known of them."""

    name: str
    node: str
    engine: str
    models: list[str]
    children: int
    healthy: bool
    running: int | None
    waiting: int | None
    tokens_per_s: float | None
    kv_use: float | None = Field(description="of the engine's room for keys and values, 0 to 1")
    gpu_use: float | None = Field(description="the mean of its GPUs, 0 to 1")


class NamespaceObject(BaseModel):
    """A namespace of the semantic cache; what its certificate says is null where the gateway cannot read it."""

    namespace: int
    model: str
    template: str
    state: Literal["pilot", "shadow", "serving", "suspended"] | None
    lookups: int
    hits: int
    share: float
    error_bound: float | None = Field(description="with 95% confidence at all moments at once, of all lookups")
    error_limit: float | None
    decision_bound: float | None = Field(description="likewise, of decisions to serve")
    decision_limit: float | None
    worst_window: float = Field(description="an estimate, of the worst 1,000 lookups")
    sentence: str | None
    why: list[str]
    audit_rate: float | None
    tokens_saved: int
    audits: int
    audit_tokens: int
    entries: int
    ttl_s: float | None


class NamespaceList(All[NamespaceObject]):
    """The tenant's namespaces. `note` says why certificates are missing, if they are."""

    note: str | None


@dataclass(frozen=True, slots=True)
class LookedThrough:
    """What many rows of a batch were read for."""

    failures: Failures
    course: list[Bucket]
    engines: list[dict[str, Any]]


def job_list(page: JobPage) -> JobList:
    """A page of jobs; a line is the seq before it, and so is where the next page begins."""
    return JobList(
        data=[JobObject(**_line(job)) for job in page.jobs],
        has_more=page.next_seq is not None,
        next_after=page.next_seq,
    )


def job_details(job: WholeJob) -> JobDetails:
    """One job; its texts are cut where they are long."""
    shortener = Shortener()
    request, response = shortener.read(job.body), shortener.read(job.response)
    return JobDetails(
        **_line(job),
        request=request if isinstance(request, dict) else {"text": request},
        settings=shortener.read(job.settings),
        response=response,
        error=_error(job, response),
        similarity=job.similarity,
        stoker=_extras(job, shortener.read(job.stoker)),
        truncated=shortener.has_cut,
    )


def error_kind(kind: FailureKind) -> ErrorKindObject:
    """Failures of one kind, with what one of them said."""
    message = kind.message
    if message is None and kind.response is not None:
        message = _said(_parsed(kind.response)) or kind.response
    return ErrorKindObject(code=kind.code, count=kind.count, message=message)


def marks_of(progress: BatchProgress) -> list[Mark]:
    """The states that a batch came to, by time."""
    moments: list[tuple[Literal["created", "in_progress", "cancelling", "finalizing", "ended"], datetime | None]] = [
        ("created", progress.created_at),
        ("in_progress", progress.in_progress_at),
        ("cancelling", progress.cancelling_at),
        ("finalizing", progress.finalizing_at),
        ("ended", progress.ended_at),
    ]
    marks = [Mark(name=name, at=at.timestamp()) for name, at in moments if at is not None]
    return sorted(marks, key=lambda mark: mark.at)


def budget_objects(
    tokens: Sequence[BudgetReport], nanos: Sequence[BudgetReport], *, currency: str
) -> list[BudgetObject]:
    """Budgets of tokens and of money as they stand."""
    return [
        *(_budget(one, "tokens", one.cap, one.spent, one.reserved) for one in tokens),
        *(_budget(one, currency, *map(money, (one.cap, one.spent, one.reserved))) for one in nanos),
    ]


def _budget(report: BudgetReport, unit: str, cap: float, spent: float, reserved: float) -> BudgetObject:
    return BudgetObject(
        unit=unit,
        key=report.key_id,
        key_name=report.key_name,
        batch=None if report.batch_id is None else batch_name(report.batch_id),
        period=report.period,
        began_at=report.began_at.timestamp(),
        cap=cap,
        spent=spent,
        reserved=reserved,
    )


def delivery_object(row: DeliveryRow) -> DeliveryObject:
    """A delivery; one that has ended has no next try."""
    return DeliveryObject(
        id=row.id.hex,
        batch=batch_name(row.batch_id),
        url=row.url,
        event=row.event,
        state=row.state,
        tries=row.tries,
        status_code=row.status_code,
        error=row.error,
        created_at=row.created_at.timestamp(),
        next_at=None if row.ended_at else row.next_at.timestamp(),
        ended_at=row.ended_at.timestamp() if row.ended_at else None,
    )


def worker_object(worker: WorkerPresence) -> WorkerObject:
    """A worker as it announced itself."""
    return WorkerObject(**{name: getattr(worker, name) for name in WorkerObject.model_fields})


def batch_details(
    progress: BatchProgress,
    seen: LookedThrough,
    *,
    budgets: list[BudgetObject],
    deliveries: list[DeliveryRow],
    waiting: WaitingJobs | None,
) -> BatchDetails:
    """All that the page of one batch shows."""
    return BatchDetails(
        batch=batch_object(progress),
        errors=[error_kind(kind) for kind in seen.failures.kinds],
        errors_complete=seen.failures.complete,
        marks=marks_of(progress),
        finished=[FinishedObject(at=bucket.at, jobs=bucket.jobs, failed=bucket.failed) for bucket in seen.course],
        budgets=budgets,
        deliveries=[delivery_object(one) for one in deliveries],
        engines=seen.engines,
        waiting=None
        if waiting is None
        else WaitingObject(
            jobs=waiting.jobs,
            tries=waiting.tries,
            next_in_s=max(0.0, waiting.next_in_s),
            last_error=waiting.last_error,
        ),
    )


def _line(job: JobLine | WholeJob) -> dict[str, Any]:
    return {
        "line": job.seq + 1,
        "custom_id": job.custom_id,
        "outcome": job.outcome,
        "source": job.source,
        "status_code": job.status_code,
        "error_code": job.error_code,
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "duration_ms": job.duration_ms,
        "ended_at": None if job.ended_at is None else job.ended_at.timestamp(),
    }


def _error(job: WholeJob, response: Any) -> JobError | None:
    """Why it failed; of a rejection by the engine what that says, which the response has whole."""
    if job.outcome is not Outcome.FAILED:
        return None
    if job.error_code is not None:
        return JobError(code=job.error_code, message=job.error_message)
    return JobError(code=f"http_{job.status_code}", message=_said(response))


def _extras(job: WholeJob, members: Any) -> dict[str, Any] | None:
    origin = {"leader": job.leader, "entry": job.entry, "namespace": job.namespace}
    known = {name: value for name, value in origin.items() if value is not None}
    return known | (members if isinstance(members, dict) else {}) or None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _said(response: Any) -> str | None:
    """The message of an error as OpenAI's protocol has it, or FastAPI's."""
    if not isinstance(response, dict):
        return None
    error = response.get("error", response.get("detail"))
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None
