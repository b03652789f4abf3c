"""Reading documents: from bytes or a URL to text, passages, vectors, and rows; the work of the documents node.

A document is claimed under a fence like a shard, and any line may be the last that runs: what was not written is
still to be read. Its new passages take the place of the old ones in one transaction; Chroma hears of it afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final, Protocol
from urllib.parse import urlsplit

from cache.index import Index
from documents.passages import Passage, Splitter, embedded_text
from models.states import DocumentState
from pipeline.heartbeat import Heartbeat
from pipeline.indexing import sync_index
from pipeline.retry import BASE_S, CAP_S, RETRY_AFTER_CAP_S
from pipeline.semantic import Embedder
from runtime.errors import Deadlocked, Fatal, LostFence, Permanent, ServiceUnreachable, Transient
from runtime.logs import get_logger
from runtime.metrics import DOCUMENTS, PASSAGES
from runtime.settings import Settings
from store.database import Database
from store.documents import (
    DocumentClaim,
    ReadDocument,
    bytes_of,
    claim_document,
    end_document,
    fail_document,
    hold_document,
    postpone_document,
)
from store.passages import replace_passages

log = get_logger(__name__)

PASSAGES_AT_ONCE: Final = 256  # between two looks at whether the document is still ours


class Converted(Protocol):
    """A document as text; `pages` are the characters at which its pages begin."""

    @property
    def markdown(self) -> str: ...
    @property
    def pages(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def note(self) -> str | None: ...


class Fetched(Protocol):
    """What a URL gave."""

    @property
    def content(self) -> bytes: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class IngestContext:
    """The parts of a child of the documents node. `index` is None where no Chroma is set."""

    database: Database
    heartbeat: Heartbeat
    convert: Callable[[bytes, str], Converted]
    fetch: Callable[[str], Fetched]
    splitter: Splitter
    embed: Embedder
    index: Index | None
    settings: Settings
    draining: Callable[[], bool]


@dataclass(slots=True)
class IngestReport:
    """What one call did."""

    documents: int = 0
    failed: int = 0
    passages: int = 0


@dataclass(frozen=True, slots=True)
class _Cut:
    read: ReadDocument
    passages: Sequence[Passage]
    vectors: Sequence[bytes]


class _Draining(Exception):
    """This process is to end, and the document would take long."""


async def ingest(context: IngestContext) -> IngestReport:
    """Read documents while some are due, then tell Chroma of what it lacks; safe to run twice or to die at any line."""
    report = IngestReport()
    until = time.monotonic() + context.settings.worker.yield_s
    try:
        while not context.draining() and time.monotonic() < until:
            claim = await asyncio.to_thread(_claim, context)
            if claim is None:
                break
            await _read_claimed(context, claim, report)
            await asyncio.to_thread(_sync, context)
        await asyncio.to_thread(_sync, context)
    except ServiceUnreachable as error:
        log.warning("ingest_waits", error=str(error))  # the lease gives back what is claimed
    return report


def _claim(context: IngestContext) -> DocumentClaim | None:
    with context.database.transaction() as session:
        return claim_document(session, lease_s=context.settings.worker.lease_s)


def _sync(context: IngestContext) -> None:
    if context.index is None:
        return
    try:
        sync_index(context.database, context.index)
    except ServiceUnreachable as error:
        log.warning("chroma_waits", error=str(error))


async def _read_claimed(context: IngestContext, claim: DocumentClaim, report: IngestReport) -> None:
    """Read one document and write what became of it: the one place that maps errors to its end."""
    lost = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_beat(runnable: bool | None) -> None:
        if runnable is None:
            loop.call_soon_threadsafe(lost.set)

    context.heartbeat.add(claim, on_beat)
    try:
        cut = await _cut(context, claim, lost)
        await asyncio.to_thread(_write, context, claim, cut)
        report.documents += 1
        report.passages += len(cut.passages)
        DOCUMENTS.add(1, outcome=DocumentState.READY)
        PASSAGES.add(len(cut.passages))
    except LostFence:
        log.warning("document_lost", document=claim.id, fence=claim.fence)
    except Transient as error:
        await asyncio.to_thread(_postpone, context, claim, error)
    except Permanent as error:
        report.failed += 1
        await asyncio.to_thread(_fail, context, claim, error.code, str(error))
    except (_Draining, Deadlocked):
        await asyncio.to_thread(_give_back, context, claim, wait_s=0.0)
    except ServiceUnreachable:
        raise
    except Fatal:  # this process is at fault, and no document
        await asyncio.to_thread(_give_back, context, claim, wait_s=CAP_S)
        raise
    except Exception as error:  # a defect of ours ends the document with a traceback in the log
        log.exception("document_defect", document=claim.id)
        report.failed += 1
        await asyncio.to_thread(_fail, context, claim, "internal_error", f"{claim.source}: {error!r}")
    finally:
        context.heartbeat.remove(claim)


async def _cut(context: IngestContext, claim: DocumentClaim, lost: asyncio.Event) -> _Cut:
    began = time.monotonic()
    content, name = await asyncio.to_thread(_content, context, claim)
    digest = hashlib.sha256(content).hexdigest()
    if digest == claim.text_digest:
        read = ReadDocument(digest, len(content), None, None, None, time.monotonic() - began)
        return _Cut(read, [], [])
    converted = await asyncio.to_thread(context.convert, content, name)
    passages: list[Passage] = []
    vectors: list[bytes] = []
    if claim.collection_id is not None:
        passages = await asyncio.to_thread(context.splitter.cut, converted.markdown, pages=converted.pages)
        for at in range(0, len(passages), PASSAGES_AT_ONCE):
            if lost.is_set():
                raise LostFence
            if context.draining():
                raise _Draining
            part = await context.embed([embedded_text(one) for one in passages[at : at + PASSAGES_AT_ONCE]])
            vectors += [vector.tobytes() for vector in part]
    seconds = time.monotonic() - began
    read = ReadDocument(digest, len(content), converted.kind, converted.note, converted.markdown, seconds)
    return _Cut(read, passages, vectors)


def _content(context: IngestContext, claim: DocumentClaim) -> tuple[bytes, str]:
    """The bytes to read and what they are called."""
    with context.database.transaction() as session:
        content = bytes_of(session, claim)
    if content is not None:
        return content, PurePath(claim.source).name
    if urlsplit(claim.source).scheme not in ("http", "https"):
        raise Permanent(f"{claim.source}: its bytes are gone; add it again", code="bytes_missing")
    fetched = context.fetch(claim.source)
    return fetched.content, fetched.name


def _write(context: IngestContext, claim: DocumentClaim, cut: _Cut) -> None:
    """One transaction: the document's text and passages, in the place of the old ones. Raises LostFence."""
    is_new = cut.read.markdown is not None
    with context.database.transaction() as session:
        if not hold_document(session, claim):
            raise LostFence
        if is_new and claim.collection_id is not None:
            embedder = context.embed.id
            if not replace_passages(session, claim, cut.passages, cut.vectors, embedder=embedder):
                raise Permanent(
                    f"{claim.source}: its collection has vectors of the embedder {claim.embedder}, and this node's is "
                    f"{embedder}; use one embedder for a collection, or add to a new one",
                    code="other_embedder",
                )
        end_document(session, claim, cut.read, passages=len(cut.passages) if is_new else None)


def _fail(context: IngestContext, claim: DocumentClaim, code: str, message: str) -> None:
    storable = message.replace("\0", "").encode(errors="ignore").decode()  # a server's words may be in it
    with context.database.transaction() as session:
        fail_document(session, claim, code=code, message=storable)
    DOCUMENTS.add(1, outcome=DocumentState.FAILED)


def _give_back(context: IngestContext, claim: DocumentClaim, *, wait_s: float) -> None:
    """It is at no fault: no failure of its own is counted."""
    with context.database.transaction() as session:
        postpone_document(session, claim, wait_s=wait_s, counted=False)


def _postpone(context: IngestContext, claim: DocumentClaim, error: Transient) -> None:
    if claim.tries + 1 >= context.settings.limits.max_tries:
        _fail(context, claim, "retries_exhausted", f"failed {claim.tries + 1} times, the last time with: {error}")
        return
    wait_s = random.uniform(0, min(CAP_S, BASE_S * 2**claim.tries))  # noqa: S311  # jitter, not a secret
    wished_s = min(error.retry_after_s or 0.0, RETRY_AFTER_CAP_S)
    with context.database.transaction() as session:
        postpone_document(session, claim, wait_s=max(wait_s, wished_s), counted=True)
