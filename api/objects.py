"""Files and batches as the API shows them: the contract's members, and ours under `stoker`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from fastapi import Path
from pydantic import BaseModel, Field

from api.cost_objects import Money
from models.file_names import made_filename, made_name
from models.money import money
from models.names import batch_name
from models.states import BatchState, CacheMode, Ending, JobOrder, Part, Priority, Purpose, Trust
from pipeline.made_files import MadeFile
from store.batches import BatchProgress
from store.files import FileEntry

Object = TypeVar("Object", bound=BaseModel)
BATCH_ID: Final = "^batch_[0-9a-f]{32}$"
BatchId = Annotated[str, Path(pattern=BATCH_ID)]


class FileExtras(BaseModel):
    """What we know of a file beyond the contract."""

    sha256: str | None = None
    estimate: dict[str, Any] | None = Field(None, description="of GET …/estimate, once it was asked for")


class FileObject(BaseModel):
    """A file. `bytes` of results is 0 while they are not complete, or not yet counted."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None
    stoker: FileExtras = FileExtras()


class DeletedFile(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Problem(BaseModel):
    """One thing that was wrong with a batch's file; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Problems(BaseModel):
    """Why validation refused a batch."""

    object: Literal["list"] = "list"
    data: list[Problem]


class RequestCounts(BaseModel):
    """Jobs by how they ended."""

    total: int
    completed: int
    failed: int


class InputDetails(BaseModel):
    """Prompt tokens that the engine had in its prefix cache."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Output tokens of reasoning."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of all jobs that have ended, as endpoints counted them."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Jobs(BaseModel):
    """Jobs by what became of them; `served` came from the cache or an equal job."""

    total: int
    done: int
    succeeded: int
    failed: int
    truncated: int
    empty: int
    served: int
    running_shards: int


class Tokens(BaseModel):
    """Tokens as endpoints counted them; `saved` are those that the cache spared."""

    prompt: int
    completion: int
    cached: int
    reasoning: int
    saved: int


class BatchExtras(BaseModel):
    """What we know of a batch beyond the contract."""

    name: str
    priority: Priority
    weight: float
    cache: CacheMode | None
    order: JobOrder | None
    paused_reason: str | None
    skipped: int
    retry_of: str | None
    labels: dict[str, str]
    output_file_id: str = Field(description="also while it runs: what has ended by now")
    error_file_id: str
    jobs: Jobs
    tokens: Tokens
    trust: Trust
    budget_tokens: int | None
    budget_money: float | None = Field(description="in the currency of all prices; `cost` is what was spent")
    cost: Money | None = Field(description="what priced endpoints asked so far; null where none was asked")
    webhook: str | None


class BatchObject(BaseModel):
    """A batch, with the contract's members and states."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: Problems | None = None
    input_file_id: str
    completion_window: str
    status: BatchState
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: Usage
    metadata: dict[str, str] | None = None
    stoker: BatchExtras


class Listing(BaseModel, Generic[Object]):
    """One page of a list; the next one begins after `last_id`."""

    object: Literal["list"] = "list"
    data: list[Object]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(entry: FileEntry) -> FileObject:
    """A file that has a row."""
    is_counted = entry.size_bytes is not None
    return FileObject(
        id=entry.id,
        bytes=entry.size_bytes or 0,
        created_at=unix(entry.created_at),
        filename=entry.filename,
        purpose=entry.purpose,
        status="processed" if is_counted else "uploaded",
        status_details=None if is_counted else "complete; its bytes are being counted",
        expires_at=None if entry.expires_at is None else unix(entry.expires_at),
        stoker=FileExtras(sha256=entry.digest, estimate=entry.estimate),
    )


def made_file_object(file: MadeFile) -> FileObject:
    """A file that is made of rows; its bytes are counted after its batch's end, and those of an input never."""
    progress, entry = file.progress, file.entry
    if entry is not None:
        return file_object(entry)
    is_input = file.part is Part.INPUT
    return FileObject(
        id=file.id,
        bytes=0,
        created_at=unix(progress.created_at),
        filename=made_filename(progress.id, file.part),
        purpose=Purpose.BATCH if is_input else Purpose.BATCH_OUTPUT,
        status="processed" if is_input else "uploaded",
        status_details="made of the batch's jobs while it is read: its bytes are not counted"
        if is_input
        else "the batch runs: what has ended by now, in the input's order",
    )


def batch_object(progress: BatchProgress) -> BatchObject:
    """A batch as it stands."""
    request = progress.request or {}
    status, ended_at = _status(progress), _moment(progress.ended_at)
    ended = progress.is_ended
    answered = progress.done - progress.failed
    return BatchObject(
        id=batch_name(progress.id),
        endpoint=progress.endpoint,
        model=progress.options.get("model"),
        errors=None if progress.problems is None else Problems(data=[Problem(**one) for one in progress.problems]),
        input_file_id=progress.input_file_id or made_name(progress.id, Part.INPUT),
        completion_window=request.get("completion_window") or _window(progress),
        status=status,
        output_file_id=made_name(progress.id, Part.OUTPUT) if ended and answered else None,
        error_file_id=made_name(progress.id, Part.ERRORS) if ended and progress.failed else None,
        created_at=unix(progress.created_at),
        in_progress_at=_moment(progress.in_progress_at),
        expires_at=_moment(progress.expires_at),
        finalizing_at=_moment(progress.finalizing_at),
        completed_at=ended_at if status is BatchState.COMPLETED else None,
        failed_at=ended_at if status is BatchState.FAILED else None,
        expired_at=ended_at if status is BatchState.EXPIRED else None,
        cancelling_at=_moment(progress.cancelling_at),
        cancelled_at=ended_at if status is BatchState.CANCELLED else None,
        request_counts=RequestCounts(total=progress.total, completed=answered, failed=progress.failed),
        usage=_usage(progress),
        metadata=request.get("metadata"),
        stoker=_extras(progress, request.get("stoker") or {}),
    )


def unix(moment: datetime) -> int:
    """Whole seconds since 1970."""
    return int(moment.timestamp())


def _moment(moment: datetime | None) -> int | None:
    return None if moment is None else unix(moment)


def _status(progress: BatchProgress) -> BatchState:
    """The contract's state: a batch that was cancelled is `cancelling` until it has ended."""
    if progress.ending is Ending.CANCELLED and not progress.is_ended:
        return BatchState.CANCELLING
    return progress.state


def _window(progress: BatchProgress) -> str:
    if progress.expires_at is None or progress.in_progress_at is None:
        return "24h"
    return f"{round((progress.expires_at - progress.in_progress_at).total_seconds())}s"


def _usage(progress: BatchProgress) -> Usage:
    return Usage(
        input_tokens=progress.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=progress.cached_tokens),
        output_tokens=progress.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=progress.reasoning_tokens),
        total_tokens=progress.prompt_tokens + progress.completion_tokens,
    )


def _extras(progress: BatchProgress, asked: dict[str, Any]) -> BatchExtras:
    return BatchExtras(
        name=progress.input_name,
        priority=progress.priority,
        weight=progress.weight,
        cache=progress.options.get("cache"),
        order=progress.options.get("order"),
        paused_reason=progress.paused_reason,
        skipped=progress.skipped,
        retry_of=None if progress.retry_of is None else batch_name(progress.retry_of),
        labels=asked.get("labels") or {},
        output_file_id=made_name(progress.id, Part.OUTPUT),
        error_file_id=made_name(progress.id, Part.ERRORS),
        jobs=Jobs(
            total=progress.total,
            done=progress.done,
            succeeded=progress.succeeded,
            failed=progress.failed,
            truncated=progress.truncated,
            empty=progress.empty,
            served=progress.served,
            running_shards=progress.running_shards,
        ),
        tokens=Tokens(
            prompt=progress.prompt_tokens,
            completion=progress.completion_tokens,
            cached=progress.cached_tokens,
            reasoning=progress.reasoning_tokens,
            saved=progress.saved_tokens,
        ),
        trust=progress.options.get("trust") or asked.get("trust") or Trust.OWN,
        budget_tokens=asked.get("budget_tokens"),
        budget_money=asked.get("budget_money"),
        cost=None if not progress.cost else Money(amount=money(progress.cost), currency=progress.currency or ""),
        webhook=(asked.get("webhook") or {}).get("url"),
    )
