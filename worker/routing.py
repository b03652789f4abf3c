"""Where one child sends requests: its worker's engine, and the registered endpoints as they come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import MOST_AT_ONCE, Route
from models.endpoints import EndpointSpec
from pipeline.endpoints import REREAD_S, KeyedEndpoint, known_endpoints, register_endpoint, with_keys
from runtime.errors import BadInput, ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import Settings
from store.database import Database
from store.endpoint_limits import EndpointLimits

log = get_logger(__name__)


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
        self._retired: list[Route] = []
        self._keys: dict[str, str | None] = {}
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
        self._due = time.monotonic() + REREAD_S
        try:
            known = await asyncio.to_thread(self._known)
        except (ServiceUnreachable, BadInput) as error:
            log.warning("endpoints_not_read", error=str(error))
            return
        routes: dict[str, Route] = {}
        for one in known:
            route = self._routes.get(one.spec.name)
            if route is None or route.spec != one.spec or self._keys.get(one.spec.name) != one.key:
                route = await self._opened(one)
            if route is not None:
                routes[one.spec.name] = route
        self._retired += [route for name, route in self._routes.items() if routes.get(name) is not route]
        self._routes, self._keys = routes, {one.spec.name: one.key for one in known}
        self.router.set_routes(routes.values())
        await self.router.learn_models()
        await self._close_retired()

    async def _close_retired(self) -> None:
        """Close those that are no longer registered, once nothing is on its way to them."""
        for route in [route for route in self._retired if not route.running]:
            self._retired.remove(route)
            await route.endpoint.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close every connection."""
        registered = [route.endpoint for route in (*self._routes.values(), *self._retired)]
        for endpoint in (*self._engines, *registered):
            await endpoint.__aexit__(None, None, None)
        await self._limits.close()

    def _engine(self, kind: type[Endpoint], url: str | None, api_key: str | None) -> Route | None:
        if not url:
            return None
        timeout_s = self._settings.limits.request_timeout_s
        endpoint = kind(url, api_key=api_key, timeout_s=timeout_s, connections=self._places)
        self._engines.append(endpoint)
        return Route(endpoint, places=self._places, held_back=self._held_back)

    def _known(self) -> list[KeyedEndpoint]:
        return with_keys(known_endpoints(self._database, self._settings))

    def _engine_id_of(self, spec: EndpointSpec) -> int:
        with self._database.transaction() as session:
            return register_endpoint(session, spec, currency=self._settings.cost.currency)

    async def _opened(self, known: KeyedEndpoint) -> Route | None:
        settings = self._settings
        try:
            endpoint = known.connect(
                timeout_s=settings.limits.request_timeout_s,
                connections=MOST_AT_ONCE,
                first_byte_s=settings.endpoints.first_byte_s,
                idle_s=settings.endpoints.idle_s,
            )
            engine_id = await asyncio.to_thread(self._engine_id_of, known.spec)
        except (BadInput, ServiceUnreachable) as error:
            log.error("endpoint_unusable", endpoint=known.spec.name, error=str(error))
            return None
        await endpoint.__aenter__()
        return Route.of(known.spec, endpoint, engine_id=engine_id, sharers=self._sharers)
