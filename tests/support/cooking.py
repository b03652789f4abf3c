"""Recipes in one worker child: documents that were read, the lines about them, and what became of these."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from cache.index import Index
from documents.kinds import Kind
from documents.passages import Splitter
from pipeline.cook import Cook
from pipeline.export import write_lines
from pipeline.heartbeat import Heartbeat
from pipeline.ingest import IngestContext, IngestReport, ingest
from pipeline.search import Library
from runtime.errors import Permanent
from runtime.settings import Settings
from store.database import Database
from store.documents import NewDocument, add_document, extend_document_leases, made_collection
from tests.support.batches import chat
from tests.support.conversing import Child, ShownEndpoint, store_lines
from tests.support.queries import TopicEmbedder
from tests.support.scripted_answers import digest

WINDOW = 512  # tokens; a part of a document then has some 250 of them
OUTPUT = 64
SECTIONS = 14
SCHEMA = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
LABELS = {"labels": ["invoice", "letter"]}
SHORT = "# Offer\n\nWe offer you 3 chairs."


@dataclass(frozen=True)
class Plain:
    """A document that is text already."""

    markdown: str
    kind: Kind = Kind.TEXT
    pages: tuple[int, ...] = ()
    note: str | None = None


def cook_of(database: Database, *, window_tokens: int = WINDOW) -> Cook:
    return Cook(database, Library(database, None, TopicEmbedder()), window_tokens=window_tokens)


def add(
    database: Database, content: str, *, name: str = "a.txt", collection: str | None = None, tenant: str = "local"
) -> int:
    """A document that waits to be read; again by its name with other content it is the same one."""
    document = NewDocument(f"/docs/{name}", content.encode(), digest(content, 32).hex(), len(content))
    with database.transaction() as session:
        into = None if collection is None else made_collection(session, tenant, collection)
        return add_document(session, document, tenant=tenant, collection_id=into)[0]


def fetches_nothing(url: str) -> Any:
    raise AssertionError(url)


def read_all(
    database: Database, *, index: Index | None = None, fetch: Callable[[str], Any] = fetches_nothing
) -> IngestReport:
    """Read what waits, as the documents node does, but for the process that converts."""

    def convert(content: bytes, name: str) -> Plain:
        if content.startswith(b"broken"):
            raise Permanent(f"{name} is damaged", code="corrupt_document")
        return Plain(content.decode())

    settings = Settings.model_construct()
    with Heartbeat(database, lease_s=30.0, interval_s=10.0, extend=extend_document_leases) as heartbeat:
        context = IngestContext(
            database=database,
            heartbeat=heartbeat,
            convert=convert,
            fetch=fetch,
            splitter=Splitter(None, most_tokens=40),
            embed=TopicEmbedder(),
            index=index,
            settings=settings,
            draining=lambda: False,
        )
        return asyncio.run(ingest(context))


def read(database: Database, content: str, collection: str | None = None, tenant: str = "local") -> int:
    """A document that has been read."""
    document = add(database, content, collection=collection, tenant=tenant)
    read_all(database)
    return document


def line(recipe: str, document: int, instruction: str = "Do it.", **stoker: Any) -> dict[str, Any]:
    return {"body": chat(instruction), "stoker": {"recipe": recipe, "document": document, **stoker}}


def lines_of(database: Database, batch_id: UUID) -> list[dict[str, Any]]:
    """The result lines of a batch, errors included."""
    written = io.BytesIO()
    write_lines(database, batch_id, output=written, errors=written)
    return [json.loads(one) for one in written.getvalue().splitlines()]


def done(child: Child, cook: Cook, folder: Path, one: dict[str, Any], *, tenant: str = "local") -> dict[str, Any]:
    """The result line of a batch of this line alone."""
    batch_id = store_lines(child.database, folder, [one], tenant=tenant)
    assert child.feed(recipes=cook).jobs == 1
    [found] = lines_of(child.database, batch_id)
    return found


def answer_of(shown: dict[str, Any]) -> str:
    said: str = shown["response"]["body"]["choices"][0]["message"]["content"]
    return said


def section(number: int, *, word: str = "words") -> str:
    return f"## Section {number}\n\nsection-{number}. " + f"{word} of section {number} and no other. " * 12


def long_document(**changed: str) -> str:
    return "\n\n".join(changed.get(f"s{number}") or section(number) for number in range(SECTIONS))


def markers(said: str) -> list[str]:
    return sorted(set(re.findall(r"section-\d+", said)), key=lambda one: int(one.partition("-")[2]))


ALL_MARKERS = [f"section-{number}" for number in range(SECTIONS)]


def summary(_: int, body: dict[str, Any]) -> dict[str, Any]:
    """What an engine says that keeps the markers, and needs all the tokens that it may have but a few."""
    prompt = body["messages"][-1]["content"]
    words = [*markers(prompt), *(f"{digest(prompt, 4).hex()}" for _ in range(OUTPUT))][: body["max_tokens"] - 4]
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
    return {
        "choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": " ".join(words)}}],
        "usage": usage,
    }


def steps_asked(endpoint: ShownEndpoint) -> list[str]:
    """The names of steps that came, without what they belong to."""
    return sorted(name.split("_")[-1].rpartition("-")[0] for name in endpoint.request_ids)
