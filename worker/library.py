"""Searching documents from the settings. Its libraries are an extra, and slow to load: only here, on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference.endpoint import Endpoint
from runtime.logs import get_logger
from runtime.settings import Settings
from store.database import Database
from worker.semantic import VectorParts, embedder_of, index_of

if TYPE_CHECKING:
    from pipeline.cook import Cook
    from pipeline.retrieval import Retrieval
    from pipeline.search import Library

log = get_logger(__name__)


def library_of(database: Database, settings: Settings) -> tuple[Library, set[Endpoint]]:
    """The way to collections, and the endpoint to open for its embedder. Raises BadInput for what is missing."""
    embed, endpoints = embedder_of(settings.cache)
    from pipeline.search import Library  # noqa: PLC0415

    return Library(database, None if settings.cache.chroma_url is None else index_of(settings.cache), embed), endpoints


def document_jobs(database: Database, settings: Settings, parts: VectorParts) -> tuple[Retrieval | None, Cook | None]:
    """What finds passages for jobs, and what does recipes; none where a library is missing, and the log says which."""
    try:
        from pipeline.cook import Cook  # noqa: PLC0415
        from pipeline.retrieval import Retrieval  # noqa: PLC0415
        from pipeline.search import Library  # noqa: PLC0415
    except ImportError as error:
        log.error("documents_off", lacks=error.name, remedy="make documents")
        return None, None
    library = Library(database, parts.index, parts.embed)
    return Retrieval(library, window_tokens=settings.engine.context_tokens), Cook(
        database, library, window_tokens=settings.engine.context_tokens
    )
