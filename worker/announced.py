"""What a worker says that it serves: its own engine's models, and what the registered endpoints answer to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from models.endpoints import EndpointSpec
from models.states import Trust
from pipeline.endpoints import REREAD_S, known_endpoints, with_keys
from runtime.errors import BadInput, ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import Settings
from store.database import Database

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Announced:
    """Sorted names of models, those that external endpoints serve apart, and of the endpoints that can be used."""

    models: list[str]
    external_models: list[str]
    endpoints: list[str]


NOTHING_ANNOUNCED: Final = Announced([], [], [])


class Announcement:
    """Rereads the directory of endpoints every 30 s; what cannot be read stays as it was. For one thread.

    An endpoint whose key is not here is left out, so that no job comes for it. So is a model that was not there 30 s
    before, unless the worker has just begun: each child rereads as often by a clock of its own, and one that does not
    know of it yet would end its jobs as not served.
    """

    def __init__(
        self, settings: Settings, *, own_models: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._own = own_models
        self._clock = clock
        self._usable: list[EndpointSpec] = []
        self._served: set[tuple[str, Trust]] | None = None
        self._known_to_all: set[tuple[str, Trust]] = set()
        self._due = 0.0

    def current(self) -> Announced:
        """What is served now."""
        if self._clock() >= self._due:
            self._due = self._clock() + REREAD_S
            self._reread()
        own = {alias for alias, trust in self._known_to_all if trust is Trust.OWN}
        external = {alias for alias, trust in self._known_to_all if trust is Trust.EXTERNAL}
        return Announced(sorted(own.union(self._own)), sorted(external), [spec.name for spec in self._usable])

    def _reread(self) -> None:
        try:
            self._usable = usable_endpoints(self._settings, before=self._usable)
        except (BadInput, ServiceUnreachable) as error:
            log.warning("endpoints_not_read", error=str(error))
            return
        now = {(alias, spec.trust) for spec in self._usable for alias in spec.models}
        self._known_to_all = now if self._served is None else now & self._served
        self._served = now


def require_endpoints(settings: Settings) -> None:
    """Raise BadInput where a worker without an engine would have nothing that answers."""
    if not usable_endpoints(settings):
        raise BadInput(
            "this worker has no engine (STOKER_ENGINE__KIND=none and no STOKER_ENGINE__URL) and no registered endpoint "
            "that it can use: add one with `stoker endpoints add`, and see `stoker endpoints check`"
        )


def usable_endpoints(settings: Settings, *, before: Sequence[EndpointSpec] = ()) -> list[EndpointSpec]:
    """The registered endpoints whose keys can be read here; those of `before` are not looked at again."""
    database = Database(settings.require_postgres(), pool_size=1)
    try:
        known = known_endpoints(database, settings)
    finally:
        database.close()
    usable = [*before, *(found.spec for found in with_keys(spec for spec in known if spec not in before))]
    return [spec for spec in known if spec in usable]
