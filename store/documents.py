"""SQL of documents: added, claimed under a fence, ended with their passages or an error, removed.

Functions take a session and never commit. A document is added once by its source: the same bytes again change
nothing, other bytes wait to be read and leave what was made of the earlier ones until they are.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import DocumentState
from runtime.errors import NotFound

CRASHES_TO_POISON = 3  # attempts in a row that died with their process: its reading kills it


class Added(StrEnum):
    """What adding a document did."""

    NEW = "new"
    CHANGED = "changed"
    AGAIN = "again"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class StoredCollection:
    """A collection: what Chroma calls it, and whose vectors it has once it has some."""

    id: int
    index_name: str
    embedder: str | None


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A file's bytes and their sha256, or, with neither, a URL that is to be fetched. `failure` is a stated refusal."""

    source: str
    content: bytes | None = None
    digest: str | None = None
    size_bytes: int | None = None
    failure: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class DocumentClaim:
    """A document to be read. `text_digest` is of the bytes that its present text was made from."""

    id: int
    fence: int
    tenant: str
    source: str
    collection_id: int | None
    index_name: str | None
    embedder: str | None
    text_digest: str | None
    tries: int

    @property
    def key(self) -> tuple[int, int]:
        """What tells this attempt from every other."""
        return self.id, self.fence


@dataclass(frozen=True, slots=True)
class ReadDocument:
    """What was made of a document's bytes. `markdown` is None where they are those that its text was made from."""

    digest: str
    size_bytes: int
    kind: str | None
    note: str | None
    markdown: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A document as it is listed; `digest` is the sha256 of its newest bytes."""

    id: int
    source: str
    digest: str | None
    collection: str | None
    state: DocumentState
    kind: str | None
    size_bytes: int | None
    passages: int
    note: str | None
    error_code: str | None
    error_message: str | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class DocumentText:
    """A document as a recipe reads it."""

    source: str
    state: DocumentState
    kind: str | None
    text_digest: str | None
    markdown: str | None
    passages: int
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class Tally:
    """Documents by state, and their passages. `unindexed` of these are not yet in Chroma."""

    pending: int = 0
    running: int = 0
    ready: int = 0
    failed: int = 0
    passages: int = 0
    unindexed: int = 0

    @property
    def ended(self) -> int:
        """How many are done with."""
        return self.ready + self.failed

    @property
    def total(self) -> int:
        """All of them."""
        return self.ended + self.pending + self.running


def made_collection(session: Session, tenant: str, name: str) -> int:
    """The collection of this name, made if there is none."""
    return int(
        session.execute(
            text("""
        INSERT INTO collections (tenant, name, index_name) VALUES (:tenant, :name, :index)
        ON CONFLICT (tenant, name) DO UPDATE SET name = excluded.name RETURNING id"""),
            {"tenant": tenant, "name": name, "index": f"stoker-{secrets.token_hex(16)}"},
        ).scalar_one()
    )


def add_document(
    session: Session, document: NewDocument, *, tenant: str, collection_id: int | None, force: bool = False
) -> tuple[int, Added]:
    """Let a document be read, unless its bytes were: (its id, what was done). A URL is always fetched again."""
    state = DocumentState.PENDING if document.failure is None else DocumentState.FAILED
    code, message = document.failure or (None, None)
    values = {
        "tenant": tenant,
        "collection": collection_id,
        "source": document.source,
        "digest": document.digest,
        "size": document.size_bytes,
        "state": state.value,
        "code": code,
        "message": message,
        "force": force,
    }
    before = session.execute(
        text("""
        SELECT digest, state FROM documents
        WHERE tenant = :tenant AND collection_id IS NOT DISTINCT FROM :collection AND source = :source FOR UPDATE"""),
        values,
    ).one_or_none()
    row = session.execute(
        text("""
        INSERT INTO documents AS d (tenant, collection_id, source, digest, size_bytes, state, error_code,
            error_message, ended_at)
        VALUES (:tenant, :collection, :source, :digest, :size, :state, :code, :message,
            CASE WHEN CAST(:code AS text) IS NULL THEN NULL ELSE clock_timestamp() END)
        ON CONFLICT ON CONSTRAINT uq_documents_source DO UPDATE SET digest = coalesce(excluded.digest, d.digest),
            size_bytes = excluded.size_bytes, state = excluded.state, fence = d.fence + 1, crashes = 0, tries = 0,
            not_before = NULL, lease_until = NULL, error_code = excluded.error_code,
            error_message = excluded.error_message, ended_at = excluded.ended_at,
            text_digest = CASE WHEN :force THEN NULL ELSE d.text_digest END
        WHERE :force OR d.state = 'failed' OR d.digest IS DISTINCT FROM excluded.digest
            AND (excluded.digest IS NOT NULL OR excluded.state = 'failed' OR d.state NOT IN ('pending', 'running'))
        RETURNING id, fence"""),
        values,
    ).one_or_none()
    if row is None:
        return _id_of(session, values), Added.UNCHANGED
    if document.content is not None:
        session.execute(
            text("""
            INSERT INTO document_bytes (document_id, content) VALUES (:id, :content)
            ON CONFLICT (document_id) DO UPDATE SET content = excluded.content"""),
            {"id": row.id, "content": document.content},
        )
    elif document.failure is not None:
        _forget_bytes(session, row.id)
    if before is None:
        return row.id, Added.NEW
    return row.id, Added.AGAIN if document.digest in (None, before.digest) else Added.CHANGED


def claim_document(session: Session, *, lease_s: float) -> DocumentClaim | None:
    """Take the oldest document that is to be read, and a new fence; None if there is none that is due."""
    row = session.execute(
        text("""
        WITH d AS (
            UPDATE documents SET state = 'running', fence = fence + 1, not_before = NULL,
                lease_until = clock_timestamp() + make_interval(secs => :lease_s)
            WHERE id = (SELECT id FROM documents WHERE state = 'pending'
                AND (not_before IS NULL OR not_before <= clock_timestamp()) ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING *)
        SELECT d.id, d.fence, d.tenant, d.source, d.collection_id, c.index_name, c.embedder, d.text_digest, d.tries
        FROM d LEFT JOIN collections c ON c.id = d.collection_id"""),
        {"lease_s": lease_s},
    ).one_or_none()
    return None if row is None else DocumentClaim(*row)


def extend_document_leases(session: Session, fences: Mapping[int, int], *, lease_s: float) -> dict[int, bool]:
    """Keep these documents (id → fence): the ids that are still ours, all of which may go on."""
    rows = session.scalars(
        text("""
        UPDATE documents d SET lease_until = clock_timestamp() + make_interval(secs => :lease_s)
        FROM unnest(CAST(:ids AS int8[]), CAST(:fences AS int8[])) AS h (id, fence)
        WHERE d.id = h.id AND d.fence = h.fence AND d.state = 'running' RETURNING d.id"""),
        {"ids": list(fences), "fences": list(fences.values()), "lease_s": lease_s},
    )
    return dict.fromkeys(rows, True)


def bytes_of(session: Session, claim: DocumentClaim) -> bytes | None:
    """What is to be read, where it did not come from a URL."""
    return session.execute(
        text("SELECT content FROM document_bytes WHERE document_id = :id"), {"id": claim.id}
    ).scalar_one_or_none()


def hold_document(session: Session, claim: DocumentClaim) -> bool:
    """Lock the claimed document to the end of the transaction; false if the fence is lost."""
    held = session.execute(
        text("SELECT 1 FROM documents WHERE id = :id AND fence = :fence AND state = 'running' FOR NO KEY UPDATE"),
        {"id": claim.id, "fence": claim.fence},
    ).one_or_none()
    return held is not None


def end_document(session: Session, claim: DocumentClaim, read: ReadDocument, *, passages: int | None) -> None:
    """It is ready; its passages are written. For one that is held. `passages` None: they stay as they are."""
    session.execute(
        text("""
        UPDATE documents SET state = 'ready', digest = :digest, text_digest = :digest, size_bytes = :size_bytes,
            kind = coalesce(:kind, kind), markdown = coalesce(:markdown, markdown),
            note = CASE WHEN CAST(:markdown AS text) IS NULL THEN note ELSE :note END,
            passages = coalesce(:passages, passages), seconds = :seconds, error_code = NULL, error_message = NULL,
            crashes = 0, lease_until = NULL, ended_at = clock_timestamp() WHERE id = :id"""),
        {
            "id": claim.id,
            "digest": read.digest,
            "size_bytes": read.size_bytes,
            "kind": read.kind,
            "note": read.note,
            "markdown": read.markdown,
            "passages": passages,
            "seconds": read.seconds,
        },
    )
    _forget_bytes(session, claim.id)


def fail_document(session: Session, claim: DocumentClaim, *, code: str, message: str) -> bool:
    """It ends with this error; false if the fence is lost. What was made of earlier bytes stays."""
    if not hold_document(session, claim):
        return False
    session.execute(
        text("""
        UPDATE documents SET state = 'failed', error_code = :code, error_message = :message, lease_until = NULL,
            ended_at = clock_timestamp() WHERE id = :id"""),
        {"id": claim.id, "code": code, "message": message},
    )
    _forget_bytes(session, claim.id)
    return True


def postpone_document(session: Session, claim: DocumentClaim, *, wait_s: float, counted: bool) -> bool:
    """It waits to be read again, after a failure if `counted`; false if the fence is lost."""
    row = session.execute(
        text("""
        UPDATE documents SET state = 'pending', lease_until = NULL, crashes = 0,
            tries = tries + CASE WHEN :counted THEN 1 ELSE 0 END,
            not_before = clock_timestamp() + make_interval(secs => :wait_s)
        WHERE id = :id AND fence = :fence AND state = 'running' RETURNING 1"""),
        {"id": claim.id, "fence": claim.fence, "wait_s": wait_s, "counted": counted},
    ).one_or_none()
    return row is not None


def recover_documents(session: Session, *, lease_s: float) -> list[tuple[int, int]]:
    """Give back the documents whose lease is over: (id, crashes). One that has killed its readers often has failed.

    Leases are spared for one lease time after Postgres started; what a write holds waits for the next call.
    """
    rows = session.execute(
        text("""
        UPDATE documents SET crashes = crashes + 1, lease_until = NULL,
            state = CASE WHEN crashes + 1 >= :most THEN 'failed' ELSE 'pending' END,
            ended_at = CASE WHEN crashes + 1 >= :most THEN clock_timestamp() END,
            error_code = CASE WHEN crashes + 1 >= :most THEN 'poison_document' END,
            error_message = CASE WHEN crashes + 1 >= :most THEN
                source || ': the process that read it died ' || (crashes + 1) || ' times in a row; '
                || 'look at the worker''s log, then add it again' END
        WHERE id IN (SELECT id FROM documents WHERE state = 'running' AND lease_until < clock_timestamp()
            AND pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => :lease_s)
            ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED)
        RETURNING id, crashes"""),
        {"most": CRASHES_TO_POISON, "lease_s": lease_s},
    ).all()
    poisoned = [identifier for identifier, crashes in rows if crashes >= CRASHES_TO_POISON]
    if poisoned:
        session.execute(
            text("DELETE FROM document_bytes WHERE document_id = ANY(CAST(:ids AS int8[]))"), {"ids": poisoned}
        )
    return [(identifier, crashes) for identifier, crashes in rows]


def waiting_documents(session: Session, *, limit: int, with_index: bool) -> int:
    """How many documents are due to be read, counted up to a limit; `with_index`: at least one if Chroma lacks some."""
    return int(
        session.execute(
            text("""
        SELECT greatest(
            (SELECT count(*) FROM (SELECT 1 FROM documents WHERE state = 'pending'
                AND (not_before IS NULL OR not_before <= clock_timestamp()) LIMIT :limit) AS due),
            CAST(:with_index AND (EXISTS (SELECT FROM passages WHERE NOT indexed)
                OR EXISTS (SELECT FROM collections WHERE lost) OR EXISTS (SELECT FROM vector_removals)) AS int))"""),
            {"limit": limit, "with_index": with_index},
        ).scalar_one()
    )


def tally_of(session: Session, ids: Sequence[int] | None) -> Tally:
    """How far these documents are; None: all, of all tenants."""
    row = session.execute(
        text("""
        SELECT count(*) FILTER (WHERE state = 'pending'), count(*) FILTER (WHERE state = 'running'),
            count(*) FILTER (WHERE state = 'ready'), count(*) FILTER (WHERE state = 'failed'),
            CAST(coalesce(sum(passages), 0) AS int8), (SELECT count(*) FROM passages p WHERE NOT p.indexed
                AND (CAST(:ids AS int8[]) IS NULL OR p.document_id = ANY(CAST(:ids AS int8[]))))
        FROM documents WHERE CAST(:ids AS int8[]) IS NULL OR id = ANY(CAST(:ids AS int8[]))"""),
        {"ids": None if ids is None else list(ids)},
    ).one()
    return Tally(*row)


def list_documents(
    session: Session, *, tenant: str, collection: str | None = None, ids: Sequence[int] | None = None
) -> list[DocumentRow]:
    """The tenant's documents by collection and source: of one collection, or these, or all."""
    rows = session.execute(
        text("""
        SELECT d.id, d.source, d.digest, c.name, d.state, d.kind, d.size_bytes, d.passages, d.note, d.error_code,
            d.error_message, d.seconds
        FROM documents d LEFT JOIN collections c ON c.id = d.collection_id
        WHERE d.tenant = :tenant AND c.name IS NOT DISTINCT FROM coalesce(CAST(:collection AS text), c.name)
            AND (CAST(:ids AS int8[]) IS NULL OR d.id = ANY(CAST(:ids AS int8[])))
        ORDER BY c.name, d.source"""),
        {"tenant": tenant, "collection": collection, "ids": None if ids is None else list(ids)},
    )
    return [
        DocumentRow(identifier, source, digest, name, DocumentState(state), *rest)
        for identifier, source, digest, name, state, *rest in rows
    ]


def list_collections(session: Session, *, tenant: str) -> list[tuple[str, Tally]]:
    """The tenant's collections by name, and how far the documents of each are."""
    rows = session.execute(
        text("""
        SELECT c.name, count(d.id) FILTER (WHERE d.state = 'pending'), count(d.id) FILTER (WHERE d.state = 'running'),
            count(d.id) FILTER (WHERE d.state = 'ready'), count(d.id) FILTER (WHERE d.state = 'failed'),
            CAST(coalesce(sum(d.passages), 0) AS int8),
            (SELECT count(*) FROM passages p WHERE p.collection_id = c.id AND NOT p.indexed)
        FROM collections c LEFT JOIN documents d ON d.collection_id = c.id
        WHERE c.tenant = :tenant GROUP BY c.id ORDER BY c.name"""),
        {"tenant": tenant},
    )
    return [(name, Tally(*counts)) for name, *counts in rows]


def text_of_document(session: Session, document_id: int, *, tenant: str) -> DocumentText:
    """A document's text. Raises NotFound where the tenant has no such document."""
    row = session.execute(
        text("""
        SELECT source, state, kind, text_digest, markdown, passages, error_code, error_message FROM documents
        WHERE id = :id AND tenant = :tenant"""),
        {"id": document_id, "tenant": tenant},
    ).one_or_none()
    if row is None:
        raise NotFound(f"no document {document_id}; `stoker documents list` shows them")
    return DocumentText(**{**row._asdict(), "state": DocumentState(row.state)})


def remove_documents(session: Session, sources: Sequence[str], *, tenant: str, collection_id: int) -> list[str]:
    """Delete documents of a collection by source, and let their vectors leave Chroma: the sources that were there."""
    return _delete(session, "d.source = ANY(CAST(:sources AS text[]))", tenant, collection_id, sources=list(sources))


def remove_collection(session: Session, *, tenant: str, collection_id: int) -> int:
    """Delete a collection with all its documents: how many these were.

    Its documents are locked before itself, as a reader does that names its embedder.
    """
    count = len(_delete(session, "true", tenant, collection_id))
    session.execute(
        text("""
        INSERT INTO vector_removals (index_name, passage_id) SELECT index_name, 0 FROM collections WHERE id = :id
        ON CONFLICT DO NOTHING"""),
        {"id": collection_id},
    )
    session.execute(text("DELETE FROM collections WHERE id = :id"), {"id": collection_id})
    return count


def collection_named(session: Session, tenant: str, name: str) -> StoredCollection:
    """The collection. Raises NotFound if the tenant has none of this name."""
    row = session.execute(
        text("SELECT id, index_name, embedder FROM collections WHERE tenant = :tenant AND name = :name"),
        {"tenant": tenant, "name": name},
    ).one_or_none()
    if row is None:
        raise NotFound(f"no collection {name}; `stoker documents list` shows them, `stoker documents add` makes them")
    return StoredCollection(*row)


def _delete(session: Session, condition: str, tenant: str, collection_id: int, **values: Any) -> list[str]:
    found = {"tenant": tenant, "collection": collection_id, **values}
    # First, as a reader does: its write is then before all of this or after.
    session.execute(
        text(f"""
        SELECT 1 FROM documents d WHERE d.tenant = :tenant AND d.collection_id = :collection AND {condition}
        ORDER BY d.id FOR UPDATE"""),
        found,
    )
    session.execute(
        text(f"""
        INSERT INTO vector_removals (passage_id, index_name)
        SELECT p.id, c.index_name FROM passages p JOIN documents d ON d.id = p.document_id
        JOIN collections c ON c.id = d.collection_id
        WHERE d.tenant = :tenant AND d.collection_id = :collection AND {condition} ON CONFLICT DO NOTHING"""),
        found,
    )
    return list(
        session.scalars(
            text(f"""
        DELETE FROM documents d WHERE d.tenant = :tenant AND d.collection_id = :collection AND {condition}
        RETURNING d.source"""),
            found,
        )
    )


def _id_of(session: Session, values: Mapping[str, Any]) -> int:
    return int(
        session.execute(
            text("""
        SELECT id FROM documents WHERE tenant = :tenant AND collection_id IS NOT DISTINCT FROM :collection
            AND source = :source"""),
            dict(values),
        ).scalar_one()
    )


def _forget_bytes(session: Session, document_id: int) -> None:
    session.execute(text("DELETE FROM document_bytes WHERE document_id = :id"), {"id": document_id})
