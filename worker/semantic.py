"""The semantic cache's parts from the settings. Its libraries are an extra, and slow to load: only here, on demand."""

from __future__ import annotations

from collections.abc import Callable
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


def semantic_cache(
    database: Database, settings: Settings, *, engine_id: Callable[[], int | None]
) -> tuple[SemanticCache | None, set[Endpoint]]:
    """The semantic cache and what of its embedder is an endpoint; None if there is no Chroma, or it lacks a part.

    A worker without it works: lookups are misses, and the log says why.
    """
    if settings.cache.chroma_url is None:
        return None, set()
    try:
        from pipeline.semantic import SemanticCache  # noqa: PLC0415

        embed, endpoints = embedder_of(settings.cache)
        index = index_of(settings.cache)
    except (ImportError, StokerError) as error:
        log.error("semantic_cache_off", error=str(error))
        return None, set()
    lease_s = settings.worker.lease_s
    made = SemanticCache(database, index, embed, settings=settings.cache, engine_id=engine_id, lease_s=lease_s)
    return made, endpoints


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
