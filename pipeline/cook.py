"""Doing a job's recipe: its document's text, its options, and a way into the document's passages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cache.keys import read_body
from documents.passages import Splitter
from documents.prompt import Source
from models.jobs import Job, JobResult, failed
from models.line_settings import LineSettings
from models.states import DocumentState
from pipeline.lookups import NO_RETRIEVAL
from pipeline.recipe import BYTES_A_TOKEN, Recipe, Task
from pipeline.recipes import named_recipe, read_options
from pipeline.retrieval import shown
from pipeline.retry import waiting
from pipeline.search import Library
from pipeline.steps import StepFailed, Steps
from runtime.clock import utc_now
from runtime.errors import BadInput, NotFound, Permanent, ServiceUnreachable, Transient
from store.database import Database
from store.documents import DocumentText, text_of_document
from store.shards import Claim, Retry

_SPLITTER_BYTES_A_TOKEN = 4  # as a Splitter without a tokenizer counts


class Cook:
    """Does recipes for a worker child. `window_tokens` is the engine's, for lines that state none."""

    def __init__(self, database: Database, library: Library | None, *, window_tokens: int) -> None:
        self._database = database
        self._library = library
        self._window_tokens = window_tokens

    async def __call__(self, steps: Steps, job: Job, settings: LineSettings, claim: Claim) -> JobResult | Retry:
        """The job's result, or a look later while its document is being read.

        Raises what the recipe's requests raise, and Transient while Postgres does not answer.
        """
        try:
            order = await asyncio.to_thread(self._order, settings, claim.tenant)
            if order.document.state in (DocumentState.READY, DocumentState.FAILED):
                return _told(await self._cooked(order, steps, job, settings, claim), order)
        except BadInput as error:
            return failed(job.seq, code="invalid_recipe", message=str(error))
        except NotFound as error:
            return failed(job.seq, code="document_not_found", message=str(error))
        except ServiceUnreachable as error:
            raise Transient(str(error)) from error
        return replace(waiting(job, now=utc_now()), error=f"document {order.document_id} is still being read")

    def _order(self, settings: LineSettings, tenant: str) -> _Order:
        recipe = named_recipe(settings.recipe or "")
        options = read_options(recipe, settings.options or {})
        document_id = settings.document or 0
        with self._database.transaction() as session:
            return _Order(recipe, options, document_id, text_of_document(session, document_id, tenant=tenant))

    async def _cooked(self, order: _Order, steps: Steps, job: Job, settings: LineSettings, claim: Claim) -> JobResult:
        """What the recipe gives, also where it ends at one of its requests."""
        document = order.document
        if document.state is DocumentState.FAILED:
            return failed(job.seq, code=document.error_code or "", message=document.error_message or "")

        async def search(question: str, *, top_k: int) -> Sequence[tuple[Source, Mapping[str, Any]]]:
            if self._library is None:
                raise Permanent(NO_RETRIEVAL, code="retrieval_unavailable")
            hits = await self._library.search_document(
                question, document_id=order.document_id, tenant=claim.tenant, top_k=top_k
            )
            return [shown(hit) for hit in hits]

        task = Task(
            seq=job.seq,
            steps=steps,
            fields=read_body(job.body),
            options=order.options,
            document=document,
            window_tokens=settings.window_tokens or self._window_tokens,
            cut=_cut,
            search=search,
        )
        try:
            return await order.recipe.run(task)
        except StepFailed as error:
            return error.result
        except Permanent as error:
            return steps.failed(code=error.code, message=str(error))


@dataclass(frozen=True, slots=True)
class _Order:
    """What a line asks for."""

    recipe: Recipe
    options: Any
    document_id: int
    document: DocumentText


def _cut(text: str, tokens: int) -> list[str]:
    most = max(1, tokens * BYTES_A_TOKEN // _SPLITTER_BYTES_A_TOKEN)
    return [passage.text for passage in Splitter(None, most_tokens=most).cut(text)]


def _told(result: JobResult, order: _Order) -> JobResult:
    """The result, with what was done to which document."""
    document = {
        "id": order.document_id,
        "source": order.document.source,
        "kind": order.document.kind,
        "sha256": order.document.text_digest,
    }
    told = msgspec.json.decode(result.stoker) if result.stoker else {}
    stoker = msgspec.json.encode({"recipe": order.recipe.name, "document": document, **told})
    return replace(result, stoker=stoker.decode())
