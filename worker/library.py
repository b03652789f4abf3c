"""Searching documents from the settings. Its libraries are an extra, and slow to load: only here, on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference.endpoint import Endpoint
from runtime.logs import get_logger
from runtime.settings import Settings
from store.database import Database
from worker.semantic import VectorParts, embedder_of, index_of

if TYPE_CHECKING:
    from models.jobs import Job, JobResult
    from models.line_settings import LineSettings
    from pipeline.cook import Cook
    from pipeline.retrieval import Retrieval
    from pipeline.search import Library
    from pipeline.steps import Recipes, Steps
    from store.shards import Claim, Retry

log = get_logger(__name__)


def library_of(database: Database, settings: Settings) -> tuple[Library, set[Endpoint]]:
    """The way to collections, and the endpoint to open for its embedder. Raises BadInput for what is missing."""
    embed, endpoints = embedder_of(settings.cache)
    from pipeline.search import Library  # noqa: PLC0415

    return Library(database, None if settings.cache.chroma_url is None else index_of(settings.cache), embed), endpoints


def retrieval_of(database: Database, settings: Settings, parts: VectorParts) -> Retrieval | None:
    """What finds passages for jobs; None where a library is missing, and the log says which."""
    try:
        from pipeline.retrieval import Retrieval  # noqa: PLC0415
        from pipeline.search import Library  # noqa: PLC0415
    except ImportError as error:
        log.error("retrieval_off", lacks=error.name, remedy="make documents")
        return None
    library = Library(database, parts.index, parts.embed)
    return Retrieval(library, window_tokens=settings.engine.context_tokens)


def recipes_of(database: Database, settings: Settings, parts: VectorParts | None) -> Recipes:
    """What does jobs' recipes. It loads at the first one: few workers ever get any."""
    made: list[Cook] = []

    async def cook(steps: Steps, job: Job, line: LineSettings, claim: Claim) -> JobResult | Retry:
        try:
            if not made:
                made.append(_cook(database, settings, parts))
        except ImportError as error:
            return steps.failed(code="recipe_unavailable", message=f"this worker lacks {error.name}: `make documents`")
        return await made[0](steps, job, line, claim)

    return cook


def _cook(database: Database, settings: Settings, parts: VectorParts | None) -> Cook:
    from pipeline.cook import Cook  # noqa: PLC0415
    from pipeline.search import Library  # noqa: PLC0415

    library = None if parts is None else Library(database, parts.index, parts.embed)
    return Cook(database, library, window_tokens=settings.engine.context_tokens)
