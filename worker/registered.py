"""The registered endpoints of one child: looked up every now and then, opened and closed as they come and go."""

from __future__ import annotations

import asyncio
import time
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

log = get_logger(__name__)

REFRESH_S: Final = 30.0


class RegisteredEndpoints:
    """Keeps a router's routes as the rows and the file of endpoints say; lives in the child's loop.

    `sharers`: children of the worker that do the same, and send to the same endpoints.
    """

    def __init__(self, database: Database, settings: Settings, router: Router, *, sharers: int = 1) -> None:
        self._database = database
        self._settings = settings
        self._router = router
        self._sharers = sharers
        self._routes: dict[str, Route] = {}
        self._due = 0.0

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
        self._router.set_routes(self._routes.values())
        await self._router.learn_models()
        for route in before.values():  # what is under way on one keeps its own connection
            await route.endpoint.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close every connection."""
        for route in self._routes.values():
            await route.endpoint.__aexit__(None, None, None)

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
