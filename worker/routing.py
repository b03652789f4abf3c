"""Where one child sends requests: its worker's engine, and the registered endpoints as they come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import MOST_AT_ONCE, Route
from models.endpoints import EndpointSpec
from models.states import Trust
from pipeline.endpoints import key_of, known_endpoints, register_endpoint
from runtime.errors import BadInput, ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import Settings
from store.database import Database
from store.endpoint_limits import EndpointLimits

log = get_logger(__name__)

REFRESH_S: Final = 30.0


class Routing:
    """A router and its connections, for the child's loop; its routes are kept as rows and file of endpoints say.

    `places`: requests that the child keeps in flight on an engine, `held_back` of them empty at times. `sharers`:
    children of the worker that do the same. `engine_kind`: how the engine is spoken to.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        engine_url: str,
        places: int,
        held_back: Callable[[], int] = lambda: 0,
        sharers: int = 1,
        engine_kind: type[Endpoint] = Endpoint,
    ) -> None:
        self._database = database
        self._settings = settings
        self._sharers = sharers
        self._places = places
        self._held_back = held_back
        self._routes: dict[str, Route] = {}
        self._due = 0.0
        self._limits = EndpointLimits(settings.require_redis())
        self._engines: list[Endpoint] = []
        self.router = Router(
            engine=self._engine(engine_kind, engine_url, settings.engine.api_key),
            embedder=self._engine(Endpoint, settings.embeddings.url, settings.embeddings.api_key),
            limits=self._limits,
        )

    async def open(self) -> None:
        """Connect to the engines, and learn which endpoints there are."""
        for endpoint in self._engines:
            await endpoint.__aenter__()
        await self.refresh()

    async def refresh(self) -> None:
        """Learn what has changed, if it is time; what cannot be read is left as it was."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + REFRESH_S
        try:
            known = await asyncio.to_thread(self._known)
        except (ServiceUnreachable, BadInput) as error:
            log.warning("endpoints_not_read", error=str(error))
            return
        before, self._routes = self._routes, {}
        for spec, engine_id in known:
            route = before.get(spec.name)
            if route is not None and route.spec == spec:
                self._routes[spec.name] = before.pop(spec.name)
            elif (opened := await self._opened(spec, engine_id)) is not None:
                self._routes[spec.name] = opened
        self.router.set_routes(self._routes.values())
        await self.router.learn_models()
        for route in before.values():  # what is under way on one keeps its own connection
            await route.endpoint.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close every connection."""
        for endpoint in (*self._engines, *(route.endpoint for route in self._routes.values())):
            await endpoint.__aexit__(None, None, None)
        await self._limits.close()

    def _engine(self, kind: type[Endpoint], url: str | None, api_key: str | None) -> Route | None:
        if not url:
            return None
        timeout_s = self._settings.limits.request_timeout_s
        endpoint = kind(url, api_key=api_key, timeout_s=timeout_s, connections=self._places)
        self._engines.append(endpoint)
        return Route(endpoint, places=self._places, held_back=self._held_back)

    def _known(self) -> list[tuple[EndpointSpec, int]]:
        specs = known_endpoints(self._database, self._settings)
        with self._database.transaction() as session:
            return [(spec, register_endpoint(session, spec, currency=self._settings.cost.currency)) for spec in specs]

    async def _opened(self, spec: EndpointSpec, engine_id: int) -> Route | None:
        settings = self._settings
        try:
            endpoint = Endpoint(
                spec.url,
                api_key=key_of(spec),
                timeout_s=settings.limits.request_timeout_s,
                connections=MOST_AT_ONCE,
                auth=spec.auth,
                is_shared=True,
                streams=spec.trust is Trust.EXTERNAL,
                first_byte_s=settings.endpoints.first_byte_s,
                idle_s=settings.endpoints.idle_s,
            )
        except BadInput as error:
            log.error("endpoint_unusable", endpoint=spec.name, error=str(error))
            return None
        await endpoint.__aenter__()
        return Route.of(spec, endpoint, engine_id=engine_id, sharers=self._sharers)
