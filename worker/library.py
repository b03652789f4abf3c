"""Searching documents from the settings. Its libraries are an extra, and slow to load: only here, on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference.endpoint import Endpoint
from runtime.settings import Settings
from store.database import Database
from worker.semantic import embedder_of, index_of

if TYPE_CHECKING:
    from pipeline.search import Library


def library_of(database: Database, settings: Settings) -> tuple[Library, set[Endpoint]]:
    """The way to collections, and the endpoint to open for its embedder. Raises BadInput for what is missing."""
    embed, endpoints = embedder_of(settings.cache)
    from pipeline.search import Library  # noqa: PLC0415

    return Library(database, None if settings.cache.chroma_url is None else index_of(settings.cache), embed), endpoints
