"""What one prefork child owns: its asyncio loop, connections and heartbeat; made after the fork."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from urllib.parse import urlsplit

import uvloop
from billiard.process import current_process

from pipeline.cached import ExactCache
from pipeline.feed import FeedContext
from pipeline.heartbeat import Heartbeat
from pipeline.pace import Pace
from runtime.children import die_with_parent
from runtime.tracing import start_tracing, stop_tracing
from store.database import Database
from store.recent import RecentAnswers
from store.step_states import StepStates
from worker.library import recipes_of, retrieval_of
from worker.routing import Routing
from worker.semantic import semantic_cache, vector_parts
from worker.steps import WorkerParts


class Child:
    """The parts that a child's tasks share, from `worker_process_init` to its end."""

    def __init__(self, parts: WorkerParts) -> None:
        die_with_parent()
        settings = parts.settings
        start_tracing(settings, process="worker")
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._database = Database(settings.require_postgres(), pool_size=settings.postgres.pool_size, by_key=True)
        self._heartbeat = Heartbeat(
            self._database, lease_s=settings.worker.lease_s, interval_s=settings.worker.heartbeat_s
        )
        place = getattr(current_process(), "index", 0)  # in the pool: a child that dies leaves it to the next one
        tell_service_s = partial(parts.shared.set_service_s, child=place)
        tell_service_s(0.0)
        self._routing = Routing(
            self._database,
            settings,
            engine_url=parts.engine_url,
            places=parts.in_flight,
            held_back=parts.held_back,
            sharers=parts.children,
        )
        self._cache = ExactCache(
            RecentAnswers(settings.require_redis()),
            settings.cache,
            engine_id=parts.shared.engine_id,
            embeddings_url=settings.embeddings.url,
            registered=self._routing.router.registered,
        )
        self._steps = StepStates(settings.require_redis())
        vectors = vector_parts(settings.cache)
        self._embedders = set() if vectors is None else vectors.endpoints
        semantic = retrieval = None
        if vectors is not None:
            semantic = semantic_cache(self._database, settings, vectors, engine_id=parts.shared.engine_id)
            retrieval = retrieval_of(self._database, settings, vectors)
        self.runner.run(self._open())
        self._heartbeat.__enter__()
        self.context = FeedContext(
            database=self._database,
            heartbeat=self._heartbeat,
            router=self._routing.router,
            settings=settings,
            holder=f"{socket.gethostname()}:{os.getpid()}",
            engine=_engine_name(parts.engine_url),
            worker=f"{socket.gethostname()}:{os.getppid()}",
            draining=parts.shared.is_draining,
            engine_id=parts.shared.engine_id,
            cache=self._cache,
            semantic=semantic,
            steps=self._steps,
            retrieval=retrieval,
            recipes=recipes_of(self._database, settings, vectors),
            pace=Pace(on_service=tell_service_s),
            refresh=self._routing.refresh,
        )

    async def _open(self) -> None:
        await self._routing.open()
        for endpoint in self._embedders:
            await endpoint.__aenter__()

    async def _close(self) -> None:
        for endpoint in self._embedders:
            await endpoint.__aexit__(None, None, None)
        await self._routing.close()

    def close(self) -> None:
        """End the heartbeat and close every connection."""
        self._heartbeat.__exit__(None, None, None)
        self.runner.run(self._close())
        self.runner.close()
        self._cache.close()
        self._steps.close()
        self._database.close()
        stop_tracing()


def _engine_name(url: str) -> str:
    """The same for every child that feeds the same engine; a socket or loopback means something on its host only."""
    is_local = url.startswith("unix:") or urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return f"{socket.gethostname()} {url}" if is_local else url
