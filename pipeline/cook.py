"""Doing a job's recipe: its document's text, its options, and a way into the document's passages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from cache.keys import read_body
from documents.passages import Splitter
from documents.prompt import Source
from models.jobs import Job, JobResult, failed
from models.line_settings import LineSettings
from models.states import DocumentState
from pipeline.recipe import BYTES_A_TOKEN, Recipe, Task
from pipeline.recipes import named_recipe, read_options
from pipeline.retrieval import shown
from pipeline.search import Library
from pipeline.steps import Steps
from runtime.errors import BadInput, NotFound, Transient
from store.database import Database
from store.documents import DocumentText, text_of_document
from store.shards import Claim

_SPLITTER_BYTES_A_TOKEN = 4  # as a Splitter without a tokenizer counts


class Cook:
    """Does recipes for a worker child. `window_tokens` is the engine's, for lines that state none."""

    def __init__(self, database: Database, library: Library, *, window_tokens: int) -> None:
        self._database = database
        self._library = library
        self._window_tokens = window_tokens

    async def __call__(self, steps: Steps, job: Job, settings: LineSettings, claim: Claim) -> JobResult:
        """The job's result. Raises what the recipe's requests raise, and Transient while its document is being read."""
        document_id = settings.document or 0
        try:
            recipe = named_recipe(settings.recipe or "")
            options = read_options(recipe, settings.options or {})
            document = await asyncio.to_thread(self._document, document_id, claim.tenant)
        except BadInput as error:
            return failed(job.seq, code="invalid_recipe", message=str(error))
        except NotFound as error:
            return failed(job.seq, code="document_not_found", message=str(error))
        if document.state is DocumentState.FAILED:
            return failed(job.seq, code=document.error_code or "", message=document.error_message or "")
        if document.state is not DocumentState.READY:
            raise Transient(f"document {document_id} is still being read")

        async def search(question: str, *, top_k: int) -> Sequence[tuple[Source, Mapping[str, Any]]]:
            hits = await self._library.search_document(
                question, document_id=document_id, tenant=claim.tenant, top_k=top_k
            )
            return [shown(hit) for hit in hits]

        task = Task(
            seq=job.seq,
            steps=steps,
            fields=read_body(job.body),
            options=options,
            document=document,
            window_tokens=settings.window_tokens or self._window_tokens,
            cut=_cut,
            search=search,
        )
        return _told(await recipe.run(task), recipe, document, document_id)

    def _document(self, document_id: int, tenant: str) -> DocumentText:
        with self._database.transaction() as session:
            return text_of_document(session, document_id, tenant=tenant)


def _cut(text: str, tokens: int) -> list[str]:
    most = max(1, tokens * BYTES_A_TOKEN // _SPLITTER_BYTES_A_TOKEN)
    return [passage.text for passage in Splitter(None, most_tokens=most).cut(text)]


def _told(result: JobResult, recipe: Recipe, document: DocumentText, document_id: int) -> JobResult:
    """The result, with what was done to which document."""
    about = {
        "recipe": recipe.name,
        "document": {
            "id": document_id,
            "source": document.source,
            "kind": document.kind,
            "sha256": document.text_digest,
        },
    }
    told = msgspec.json.decode(result.stoker) if result.stoker else {}
    return replace(result, stoker=msgspec.json.encode(about | told).decode())
