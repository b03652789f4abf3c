"""What a worker child has for all its tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from inference.embeddings import PATH as EMBEDDINGS
from inference.endpoint import Endpoint
from pipeline.cached import ExactCache, Retrieval, Semantic
from pipeline.heartbeat import Heartbeat
from pipeline.pace import Pace
from pipeline.steps import Recipes
from runtime.settings import Settings
from store.database import Database
from store.step_states import StepStates


@dataclass(frozen=True, slots=True)
class FeedContext:
    """The parts of a child. `semantic`, `retrieval` and `recipes` are None where no Chroma is set."""

    database: Database
    heartbeat: Heartbeat
    generation: Endpoint
    embeddings: Endpoint
    settings: Settings
    holder: str
    engine: str
    """What its worker's engine is called in Postgres: equal names are one engine."""
    worker: str
    """What its worker is called in Postgres: the processes that die together."""
    in_flight: int
    draining: Callable[[], bool]
    engine_id: Callable[[], int | None]
    refused: set[Endpoint] = field(default_factory=set)
    """Endpoints that refused a connection and have not been seen healthy since."""
    cache: ExactCache | None = None
    semantic: Semantic | None = None
    steps: StepStates | None = None
    retrieval: Retrieval | None = None
    recipes: Recipes | None = None
    pace: Pace = field(default_factory=Pace)

    def endpoint(self, path: str) -> Endpoint:
        """Where requests of this path go."""
        return self.embeddings if path == EMBEDDINGS else self.generation
