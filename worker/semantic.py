"""The semantic cache's parts from the settings. Its libraries are an extra, and slow to load: only here, on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from inference.endpoint import Endpoint
from runtime.errors import BadInput, StokerError
from runtime.logs import get_logger
from runtime.settings import CacheSettings, Settings
from store.database import Database

if TYPE_CHECKING:
    from cache.index import Index
    from pipeline.semantic import Embedder, SemanticCache

log = get_logger(__name__)

EMBEDDER_TIMEOUT_S: Final = 10.0
EMBEDDER_CONNECTIONS: Final = 4


@dataclass(frozen=True, slots=True)
class VectorParts:
    """What both the semantic cache and retrieval need. `endpoints` are to be opened: the embedder's, if it is one."""

    embed: Embedder
    index: Index
    endpoints: set[Endpoint]


def vector_parts(settings: CacheSettings) -> VectorParts | None:
    """The embedder and the index; None if there is no Chroma, or it lacks a part.

    A worker without them works: semantic lookups are misses, jobs that name a collection fail, and the log says why.
    """
    if settings.chroma_url is None:
        return None
    try:
        embed, endpoints = embedder_of(settings)
        return VectorParts(embed, index_of(settings), endpoints)
    except StokerError as error:
        log.error("semantic_cache_off", error=str(error))
        return None


def semantic_cache(
    database: Database, settings: Settings, parts: VectorParts, *, engine_id: Callable[[], int | None]
) -> SemanticCache:
    """The semantic cache."""
    from pipeline.semantic import SemanticCache  # noqa: PLC0415

    return SemanticCache(
        database,
        parts.index,
        parts.embed,
        settings=settings.cache,
        engine_id=engine_id,
        lease_s=settings.worker.lease_s,
    )


def embedder_of(settings: CacheSettings, *, threads: int = 2) -> tuple[Embedder, set[Endpoint]]:
    """The embedder, and the endpoint to open for it. Raises BadInput for a missing library or folder."""
    try:
        from pipeline.embedders import EndpointEmbedder, LocalEmbedder  # noqa: PLC0415
    except ImportError as error:
        raise _lacks(error) from error
    if settings.embedder_url is None:
        return LocalEmbedder(settings, threads=threads), set()
    endpoint = Endpoint(
        settings.embedder_url,
        api_key=settings.embedder_api_key,
        timeout_s=EMBEDDER_TIMEOUT_S,
        connections=EMBEDDER_CONNECTIONS,
    )
    return EndpointEmbedder(endpoint, model=settings.embedder_model), {endpoint}


def index_of(settings: CacheSettings) -> Index:
    """The index. Raises BadInput for a missing library or a bad address."""
    try:
        from cache.index import Index  # noqa: PLC0415
    except ImportError as error:
        raise _lacks(error) from error
    return Index(settings.chroma_url or "")


def _lacks(error: ImportError) -> BadInput:
    return BadInput(f"the semantic cache lacks {error.name}: run `make cache`")
