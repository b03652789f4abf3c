"""The express node's loop in a thread of the test's process: what its child has, without Celery."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import Route
from models.endpoints import EndpointSpec
from pipeline.express import Answering, ExpressContext
from pipeline.purse import KeyPurse
from store.database import Database
from store.express import ExpressQueue
from store.presence import PresenceBoard, WorkerPresence


class ExpressNode:
    """`with ExpressNode(endpoint_url, redis_url) as node:`; `node.invite` is the hint.

    Its engine serves `scripted`; what `sell` adds is announced as `dear`. Keys pay from `database`.
    """

    database: Database

    def __init__(self, endpoint_url: str, redis_url: str, *, slots: int = 8) -> None:
        self.endpoint_url = endpoint_url
        self.redis_url = redis_url
        self.slots = slots
        self.engine_id: int | None = None
        self.seen = 0
        self._bought: Endpoint | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        self._board = PresenceBoard(self.redis_url)
        self._board.announce(
            WorkerPresence(
                name="express",
                node="express",
                children=1,
                models=["scripted"],
                external_models=["dear"],
                engine="scripted",
                healthy=True,
            )
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.withdraw("express")
        self._board.close()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def invite(self) -> None:
        """As a hint does, without waiting."""
        asyncio.run_coroutine_threadsafe(self._answering.claim(), self._loop)

    def sell(self, spec: EndpointSpec, engine_id: int) -> None:
        """Let requests go to an endpoint that bills tokens, too."""
        asyncio.run_coroutine_threadsafe(self._sell(spec, engine_id), self._loop).result()

    async def _sell(self, spec: EndpointSpec, engine_id: int) -> None:
        self._bought = Endpoint(spec.url, api_key=None, timeout_s=60, connections=self.slots, is_shared=True)
        await self._bought.__aenter__()
        self._router.set_routes([Route.of(spec, self._bought, engine_id=engine_id)])

    async def _open(self) -> None:
        self._queue = ExpressQueue(self.redis_url)
        self._endpoint = Endpoint(self.endpoint_url, api_key=None, timeout_s=60, connections=self.slots)
        await self._endpoint.__aenter__()
        self._router = Router(engine=Route(self._endpoint, places=self.slots))
        context = ExpressContext(
            queue=self._queue,
            router=self._router,
            seen=self._saw,
            engine_id=lambda: self.engine_id,
            purse=lambda key_id: KeyPurse(self.database, key_id, most_output=64),
        )
        self._answering = Answering(context)
        await self._answering.begin()

    async def _close(self) -> None:
        await self._answering.end(grace_s=0)
        for endpoint in filter(None, (self._endpoint, self._bought)):
            await endpoint.__aexit__(None, None, None)
        await self._queue.close()

    def _saw(self) -> None:
        self.seen += 1
