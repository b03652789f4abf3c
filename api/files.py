"""/v1/files, as the batch contract says; both ways stream, in flat memory."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import chain
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from api.auth import KeyedRoute, Principal, Reader, Submitter
from api.errors import ApiError, links, not_found, refusals
from api.gateway import Gateway, gateway_of
from api.objects import DeletedFile, FileObject, Listing, file_object, made_file_object
from api.uploads import Upload, receive
from models.batch_requests import Expiry
from models.file_names import upload_name
from models.lines import SubmitOptions
from models.states import CacheMode, Purpose
from pipeline.made_files import find_made_file, pieces
from pipeline.submit import FileEstimate, dry_run
from runtime.clock import uuid7
from runtime.errors import InvalidFile, ServiceUnreachable
from store.files import (
    FileEntry,
    add_upload,
    delete_file,
    find_file,
    keep_estimate,
    list_files,
    lock_uploads,
    stored_bytes,
)

router = APIRouter(prefix="/v1/files", tags=["files"], route_class=KeyedRoute)

MOST_LISTED: Final = 10_000
_OWN_LIMIT: Final = 2**62  # of the body: what streams in is held to the tenant's room
BYTES: Final = "application/octet-stream"
FileId = Annotated[str, Path(max_length=64, pattern="^file-[0-9a-z-]+$")]
_FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch", "user_data"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
                    },
                }
            }
        },
    }
}
_LINKS: Final = links(
    retrieve_file="file_id",
    delete_one_file="file_id",
    file_content="file_id",
    estimate_file="file_id",
)
_LINKS[200]["links"]["create_batch"] = {
    "operationId": "create_batch",
    "requestBody": {"input_file_id": "$response.body#/id"},
}
_CONTENT: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The bytes. Of results of a batch that still runs: what has ended by now, in the input's order, "
        "with `X-Incomplete: true`, and in `X-Last-Line` the line of the input up to which every job has ended: "
        "`?after_line=` that number gives the rest later.",
        "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}},
    }
}


class Estimate(BaseModel):
    """What a file would become as a batch; tokens are estimates, of outputs the most."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["file.estimate"] = "file.estimate"
    lines: int
    estimated_prompt_tokens: int
    most_output_tokens: int
    endpoint: str | None
    models: dict[str, int]
    problems: list[dict[str, Any]]
    problem_count: int


@router.post("", responses={**_LINKS, **refusals(400, 408, 413, 415)}, openapi_extra=_FORM, max_body_size=_OWN_LIMIT)
async def create_file(request: Request, principal: Submitter) -> FileObject:
    """Upload a file: of purpose `batch` one that ends in .jsonl. Its lines are checked by the batch."""
    gateway = gateway_of(request)
    file_id = upload_name(uuid7())
    with gateway.upload_slots.taken(principal.tenant):
        room = await run_in_threadpool(_room, gateway, principal)
        upload = await receive(request, gateway.blobs, name=file_id, most_bytes=room)
        entry = await run_in_threadpool(_keep, gateway, principal, file_id, upload)
    return file_object(entry)


@router.get("", responses=refusals(400, 404))
def list_all_files(
    request: Request,
    principal: Reader,
    purpose: Annotated[Purpose | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Listing[FileObject]:
    """The tenant's files by their creation; `after` is a file's id."""
    with gateway_of(request).database.transaction() as session:
        last = None if after is None else find_file(session, after, tenant=principal.tenant)
        found = list_files(
            session,
            tenant=principal.tenant,
            purpose=purpose,
            after=last,
            newest_first=order == "desc",
            limit=limit + 1,
        )
    page = [file_object(entry) for entry in found[:limit]]
    return listing(page, has_more=len(found) > limit)


@router.get("/{file_id}", responses=refusals(400, 404))
def retrieve_file(request: Request, principal: Reader, file_id: FileId) -> FileObject:
    """One file."""
    database = gateway_of(request).database
    made = find_made_file(database, file_id, tenant=principal.tenant)
    if made is not None:
        return made_file_object(made)
    return file_object(_upload(gateway_of(request), principal, file_id))


@router.delete("/{file_id}", responses=refusals(400, 404, 409))
def delete_one_file(request: Request, principal: Submitter, file_id: FileId) -> DeletedFile:
    """Delete a file. Batches that were made of it go on; a batch's results stay in its rows."""
    database = gateway_of(request).database
    made = find_made_file(database, file_id, tenant=principal.tenant)
    if made is not None and made.entry is None:
        raise ApiError(409, "this file is made of its batch's rows and cannot be deleted now; cancel the batch first")
    with database.transaction() as session:
        delete_file(session, file_id, tenant=principal.tenant)
    return DeletedFile(id=file_id)


@router.get("/{file_id}/content", responses={**_CONTENT, **refusals(400, 404)}, response_class=Response)
def file_content(
    request: Request,
    principal: Reader,
    file_id: FileId,
    after_line: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """A file's bytes; of results those of the lines after `after_line` of the input."""
    gateway = gateway_of(request)
    made = find_made_file(gateway.database, file_id, tenant=principal.tenant, after_line=after_line)
    if made is None:
        entry = _upload(gateway, principal, file_id)
        assert entry.blob is not None  # noqa: S101  # an upload has one
        return _streamed(gateway.blobs.pieces(entry.blob), {"Content-Length": str(entry.size_bytes)}, entry.filename)
    headers = {} if made.is_complete else {"X-Incomplete": "true"}
    headers["X-Last-Line"] = str(made.last_line)
    name = made_file_object(made).filename
    return _streamed(pieces(gateway.database, made, after_line=after_line), headers, name)


@router.get("/{file_id}/estimate", responses=refusals(400, 404, 409))
def estimate_file(request: Request, principal: Reader, file_id: FileId) -> Estimate:
    """What the file would become as a batch, before it is one: lines, tokens, models, and what is wrong with it."""
    gateway = gateway_of(request)
    if find_made_file(gateway.database, file_id, tenant=principal.tenant) is not None:
        raise ApiError(409, f"{file_id} is made of a batch's rows; only uploads are estimated", code="wrong_state")
    entry = _upload(gateway, principal, file_id)
    if entry.estimate is not None:
        return Estimate(**entry.estimate)
    assert entry.blob is not None  # noqa: S101
    with gateway.estimating(), gateway.blobs.local_copy(entry.blob) as path:
        try:
            options = SubmitOptions(
                max_output_tokens=gateway.settings.limits.max_output_tokens,
                cache=CacheMode(gateway.settings.cache.mode),
            )
            found = _estimate(dry_run(path, options=options, settings=gateway.settings, served_models=None))
        except InvalidFile as error:
            found = _estimate(None, error)
    with gateway.database.transaction() as session:
        keep_estimate(session, file_id, found.model_dump())
    return found


def listing(page: list[Any], *, has_more: bool) -> Listing[Any]:
    """One page of a list."""
    return Listing(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=has_more,
    )


def _upload(gateway: Gateway, principal: Principal, file_id: str) -> FileEntry:
    with gateway.database.transaction() as session:
        entry = find_file(session, file_id, tenant=principal.tenant)
    if entry.blob is None:
        raise not_found(f"file {file_id}")
    return entry


def _room(gateway: Gateway, principal: Principal) -> int:
    """The most bytes that the tenant's next upload may have. Raises ApiError when there is no room at all."""
    limits = gateway.settings.gateway
    with gateway.database.transaction() as session:
        left = limits.tenant_bytes - stored_bytes(session, tenant=principal.tenant)
    if left <= 0:
        raise _storage_full(gateway)
    return min(left, limits.file_bytes)


def _storage_full(gateway: Gateway) -> ApiError:
    most = gateway.settings.gateway.tenant_bytes
    return ApiError(413, f"a tenant's uploads may have {most:,} bytes together; delete some files", code="storage_full")


def _keep(gateway: Gateway, principal: Principal, file_id: str, upload: Upload) -> FileEntry:
    """Check the form, name the blob, note the file."""
    try:
        purpose, expires_after = _checked(upload)
        upload.writer.commit()
    except BaseException:
        upload.writer.discard()
        raise
    assert upload.filename is not None  # noqa: S101  # else it was refused
    try:
        with gateway.database.transaction() as session:
            lock_uploads(session, principal.tenant)
            entry = add_upload(
                session,
                file_id=file_id,
                tenant=principal.tenant,
                purpose=purpose,
                filename=upload.filename,
                size_bytes=upload.size_bytes,
                digest=upload.digest,
                blob=file_id,
                expires_after=expires_after,
            )
            if stored_bytes(session, tenant=principal.tenant) > gateway.settings.gateway.tenant_bytes:
                raise _storage_full(gateway)  # by uploads that came at the same time
            return entry
    except ServiceUnreachable:  # it may be committed all the same; if it is not, the sweep finds the blob
        raise
    except BaseException:
        gateway.blobs.delete(file_id)
        raise


def _checked(upload: Upload) -> tuple[Purpose, timedelta | None]:
    fields = dict(upload.fields)
    wished = fields.pop("purpose", None)
    if wished not in ("batch", "user_data"):
        raise ApiError(400, f"is {wished!r}; it must be `batch` or `user_data`", param="purpose")
    if wished == "batch" and not (upload.filename or "").endswith(".jsonl"):
        raise ApiError(
            400, f"{upload.filename} does not end in .jsonl, as a file of purpose `batch` must", param="file"
        )
    expiry = {name: fields.pop(f"expires_after[{name}]", None) for name in ("anchor", "seconds")}
    if fields:
        raise ApiError(400, "is unknown; known are file, purpose and expires_after", param=min(fields))
    if not any(expiry.values()):
        return Purpose(wished), None
    try:
        return Purpose(wished), Expiry.model_validate(expiry).age
    except ValidationError as error:
        raise ApiError(
            400, "must be anchor=created_at and seconds from 3600 to 2592000", param="expires_after"
        ) from error


def _streamed(content: Iterator[bytes], headers: dict[str, str], filename: str) -> StreamingResponse:
    safe = "".join(character if character.isalnum() or character in "-_. " else "_" for character in filename)
    safe = safe.encode("ascii", "replace").decode().replace("?", "_")
    first = next(content, b"")  # before the answer's head: what cannot be read is an error, not half a body
    disposition = {"Content-Disposition": f'attachment; filename="{safe}"'}
    return StreamingResponse(chain([first], content), media_type=BYTES, headers={**headers, **disposition})


def _estimate(found: FileEstimate | None, refused: InvalidFile | None = None) -> Estimate:
    problems = [] if refused is None else refused.problems
    return Estimate(
        lines=found.lines if found else 0,
        estimated_prompt_tokens=found.prompt_tokens if found else 0,
        most_output_tokens=found.output_tokens if found else 0,
        endpoint=found.endpoint if found else None,
        models=found.models if found else {},
        problems=[one.members() for one in problems],
        problem_count=0 if refused is None else refused.total,
    )
