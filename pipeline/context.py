"""What a worker child has for all its tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from inference.router import Router
from pipeline.cached import ExactCache, Retrieval, Semantic
from pipeline.heartbeat import Heartbeat
from pipeline.pace import Pace
from pipeline.steps import Recipes
from runtime.settings import Settings
from store.database import Database
from store.step_states import StepStates


async def nothing_registered() -> None:
    """No endpoint but the engine."""


@dataclass(frozen=True, slots=True)
class FeedContext:
    """The parts of a child. `semantic`, `retrieval` and `recipes` are None where no Chroma is set."""

    database: Database
    heartbeat: Heartbeat
    router: Router
    settings: Settings
    holder: str
    engine: str
    """What its worker's engine is called in Postgres: equal names are one engine."""
    worker: str
    """What its worker is called in Postgres: the processes that die together."""
    draining: Callable[[], bool]
    engine_id: Callable[[], int | None]
    cache: ExactCache | None = None
    semantic: Semantic | None = None
    steps: StepStates | None = None
    retrieval: Retrieval | None = None
    recipes: Recipes | None = None
    pace: Pace = field(default_factory=Pace)
    refresh: Callable[[], Awaitable[None]] = nothing_registered
    """Learns which endpoints are registered now."""
