"""Files as the API shows them: uploads, whose bytes are blobs, and batches' results, whose bytes are rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from models.file_names import made_filename, made_name
from models.gateway_rows import StoredFile
from models.states import Part, Purpose
from runtime.errors import NotFound


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a tenant: `blob` of an upload, `batch_id` and `part` of results; `size_bytes` None: not yet counted."""

    id: str
    tenant: str
    purpose: Purpose
    filename: str
    size_bytes: int | None
    digest: str | None
    blob: str | None
    batch_id: UUID | None
    part: Part | None
    estimate: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime | None


_COLUMNS = "id, tenant, purpose, filename, size_bytes, digest, blob, batch_id, part, estimate, created_at, expires_at"
_LIVING = "deleted_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())"


def add_upload(
    session: Session,
    *,
    file_id: str,
    tenant: str,
    purpose: Purpose,
    filename: str,
    size_bytes: int,
    digest: str,
    blob: str,
    expires_after: timedelta | None,
) -> FileEntry:
    """Note an upload whose blob is there."""
    expires_at = None if expires_after is None else text("clock_timestamp() + :age").bindparams(age=expires_after)
    session.execute(
        insert(StoredFile).values(
            id=file_id,
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            size_bytes=size_bytes,
            digest=digest,
            blob=blob,
            expires_at=expires_at,
        )
    )
    return find_file(session, file_id, tenant=tenant)


def find_file(session: Session, file_id: str, *, tenant: str) -> FileEntry:
    """A file of the tenant that is neither deleted nor expired. Raises NotFound."""
    row = session.execute(
        text(f"SELECT {_COLUMNS} FROM files WHERE id = :id AND tenant = :tenant AND {_LIVING}"),
        {"id": file_id, "tenant": tenant},
    ).one_or_none()
    if row is None:
        raise NotFound(f"no file {file_id}")
    return _entry(tuple(row))


def list_files(
    session: Session, *, tenant: str, purpose: Purpose | None, after: FileEntry | None, newest_first: bool, limit: int
) -> list[FileEntry]:
    """Up to `limit` files in the order of their creation, beginning after one of them."""
    order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
    condition = "" if purpose is None else "AND purpose = :purpose"
    if after is not None:
        condition += f" AND (created_at, id) {beyond} (:created_at, :after)"
    rows = session.execute(
        text(
            f"SELECT {_COLUMNS} FROM files WHERE tenant = :tenant AND {_LIVING} {condition} "
            f"ORDER BY created_at {order}, id {order} LIMIT :limit"
        ),
        {
            "tenant": tenant,
            "limit": limit,
            **({} if purpose is None else {"purpose": purpose.value}),
            **({} if after is None else {"created_at": after.created_at, "after": after.id}),
        },
    )
    return [_entry(tuple(row)) for row in rows]


def lock_uploads(session: Session, tenant: str) -> None:
    """Hold, to the end of the transaction, the right to add an upload to the tenant's: two see each other's bytes."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:tenant, 2))"), {"tenant": tenant})


def stored_bytes(session: Session, *, tenant: str) -> int:
    """Bytes of all uploads of a tenant whose blobs are still there."""
    return int(
        session.scalar(
            text("SELECT coalesce(sum(size_bytes), 0) FROM files WHERE tenant = :tenant AND blob IS NOT NULL"),
            {"tenant": tenant},
        )
        or 0
    )


def delete_file(session: Session, file_id: str, *, tenant: str) -> None:
    """Put a file out of sight; `forget_file` follows when its bytes are gone. Raises NotFound."""
    gone = session.scalar(
        text(
            "UPDATE files SET deleted_at = clock_timestamp() "
            f"WHERE id = :id AND tenant = :tenant AND {_LIVING} RETURNING 1"
        ),
        {"id": file_id, "tenant": tenant},
    )
    if gone is None:
        raise NotFound(f"no file {file_id}")


def keep_estimate(session: Session, file_id: str, estimate: Mapping[str, Any]) -> None:
    """Remember what the file's lines would become."""
    session.execute(
        text("UPDATE files SET estimate = CAST(:estimate AS jsonb) WHERE id = :id"),
        {"id": file_id, "estimate": json.dumps(estimate)},
    )


def add_results(session: Session, batch_id: UUID) -> None:
    """Note the files of an ended batch's results: a part without a line has none. Safe to repeat."""
    session.execute(
        text("""
        INSERT INTO files (id, tenant, purpose, filename, batch_id, part, expires_at)
        SELECT p.id, b.tenant, 'batch_output', p.filename, b.id, p.part,
            clock_timestamp() + make_interval(secs => CAST(b.request -> 'output_expires_after' ->> 'seconds' AS float8))
        FROM batches b CROSS JOIN LATERAL (
            SELECT CAST(b.sums ->> 'done' AS int8) AS done, CAST(b.sums ->> 'failed' AS int8) AS failed) s
        CROSS JOIN LATERAL (VALUES (:output, :output_name, 'output', s.done - s.failed),
            (:errors, :errors_name, 'errors', s.failed)) AS p (id, filename, part, lines)
        WHERE b.id = :id AND p.lines > 0
        ON CONFLICT DO NOTHING"""),
        {
            "id": batch_id,
            "output": made_name(batch_id, Part.OUTPUT),
            "output_name": made_filename(batch_id, Part.OUTPUT),
            "errors": made_name(batch_id, Part.ERRORS),
            "errors_name": made_filename(batch_id, Part.ERRORS),
        },
    )


def uncounted(session: Session, *, lease: timedelta) -> FileEntry | None:
    """A results file whose size nobody has counted, not given to anybody else while the lease holds."""
    row = session.execute(
        text(f"""
        UPDATE files SET counting_until = clock_timestamp() + :lease WHERE id = (
            SELECT id FROM files WHERE size_bytes IS NULL AND deleted_at IS NULL
              AND (counting_until IS NULL OR counting_until < now())
            ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
        RETURNING {_COLUMNS}"""),
        {"lease": lease},
    ).one_or_none()
    return None if row is None else _entry(tuple(row))


def set_size(session: Session, file_id: str, size_bytes: int) -> None:
    """Note a results file's size."""
    session.execute(text("UPDATE files SET size_bytes = :size WHERE id = :id"), {"id": file_id, "size": size_bytes})


def gone_blobs(session: Session, *, limit: int) -> list[tuple[str, str]]:
    """(file, blob) of uploads that are deleted or expired and that no batch is being made of, locked."""
    rows = session.execute(
        text("""
        SELECT id, blob FROM files f WHERE blob IS NOT NULL
          AND (deleted_at IS NOT NULL OR expires_at <= now())
          AND NOT EXISTS (SELECT FROM batches b WHERE b.state = 'validating' AND b.input_file_id = f.id)
        ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED"""),
        {"limit": limit},
    )
    return [(file_id, blob) for file_id, blob in rows]


def unknown_blobs(session: Session, names: Sequence[str]) -> list[str]:
    """Those of the names that belong to no file."""
    return list(
        session.scalars(
            text("SELECT n FROM unnest(CAST(:names AS text[])) AS n WHERE NOT EXISTS (SELECT FROM files WHERE id = n)"),
            {"names": list(names)},
        )
    )


def forget_file(session: Session, file_id: str) -> None:
    """Delete the row of an upload whose blob is gone."""
    session.execute(text("DELETE FROM files WHERE id = :id"), {"id": file_id})


def _entry(row: tuple[Any, ...]) -> FileEntry:
    identifier, tenant, purpose, filename, size, digest, blob, batch_id, part, *rest = row
    return FileEntry(
        identifier,
        tenant,
        Purpose(purpose),
        filename,
        size,
        digest,
        blob,
        batch_id,
        Part(part) if part else None,
        *rest,
    )
