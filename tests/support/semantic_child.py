"""A worker child with the semantic cache, in this process, on real services: what tests of that cache feed with."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import text

from cache.index import Index
from cache.policy import Policy
from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import Route
from models.lines import SubmitOptions
from models.states import CacheMode
from pipeline.cached import ExactCache
from pipeline.feed import FeedContext, FeedReport, feed
from pipeline.heartbeat import Heartbeat
from pipeline.semantic import SemanticCache
from pipeline.submit import submit_file
from runtime.settings import CacheSettings, Settings, ShardSettings
from store.database import Database
from store.engines import register_engine
from store.recent import RecentAnswers
from tests.support.batches import CHAT, chat, dispatch_all
from tests.support.queries import TOPICS, TopicEmbedder
from tests.support.scripted_endpoint import ScriptedEndpoint

PREFIX = "Say in one word what this is about.\n\nMessage: "
SUFFIX = "\n\nOne word of refund, card, transfer, login:"
INDEX_TIMEOUT_S = 1.0


def answer_topics(endpoint: ScriptedEndpoint, *, prefix: str = "") -> None:
    """Let the engine answer each query with its topic, as `prefix` begins it."""
    for topic in TOPICS:
        endpoint.script(f"[[answer {prefix}{topic}]]", match=f" {topic}{SUFFIX[:5]}")


class Child:
    """What a worker child has; `restart` forgets what it remembers."""

    def __init__(self, database: Database, *, engine_url: str, redis_url: str, chroma_url: str) -> None:
        self.database = database
        self.engine_url = engine_url
        self.redis_url = redis_url
        self.settings = CacheSettings(chroma_url=chroma_url)
        self.embedder = TopicEmbedder()
        with database.transaction() as session:
            self.engine_id = register_engine(session, {"checkpoint_digest": "1234"})
        self.restart()

    def restart(self) -> None:
        """As a new process: it remembers nothing."""
        self.semantic = SemanticCache(
            self.database,
            Index(self.settings.chroma_url or "", timeout_s=INDEX_TIMEOUT_S),
            self.embedder,
            settings=self.settings,
            engine_id=lambda: self.engine_id,
            lease_s=30.0,
        )

    def run(
        self,
        folder: Path,
        queries: list[str],
        *,
        mode: CacheMode = CacheMode.SEMANTIC,
        tenant: str = "local",
        stoker: dict[str, Any] | None = None,
        shard_jobs: int = 64,
        **fields: Any,
    ) -> UUID:
        """Submit a batch with these queries in the template and run all of it."""
        batch_id = self.submit(
            folder, queries, mode=mode, tenant=tenant, stoker=stoker, shard_jobs=shard_jobs, **fields
        )
        dispatch_all(self.database)
        self.feed()
        return batch_id

    def submit(
        self,
        folder: Path,
        queries: list[str],
        *,
        mode: CacheMode = CacheMode.SEMANTIC,
        tenant: str = "local",
        stoker: dict[str, Any] | None = None,
        shard_jobs: int = 64,
        **fields: Any,
    ) -> UUID:
        """Submit a batch with these queries in the template; custom ids are their places."""
        file = folder / f"{uuid4().hex}.jsonl"
        with file.open("w") as lines:
            for place, query in enumerate(queries):
                body = chat(f"{PREFIX}{query}{SUFFIX}", **{"temperature": 0, "max_tokens": 8, **fields})
                line = {"custom_id": f"{place}", "method": "POST", "url": CHAT, "body": body}
                lines.write(json.dumps(line | ({"stoker": stoker} if stoker else {})) + "\n")
        return submit_file(
            self.database,
            file,
            options=SubmitOptions(max_output_tokens=64, cache=mode),
            settings=Settings.model_construct(cache=self.settings, shard=ShardSettings(max_jobs=shard_jobs)),
            served_models=None,
            reuse=False,
            tenant=tenant,
        ).batch_id

    def feed(self) -> FeedReport:
        """Run what is dispatched."""
        return asyncio.run(self._feed())

    async def _feed(self) -> FeedReport:
        exact = ExactCache(RecentAnswers(self.redis_url), self.settings, engine_id=lambda: self.engine_id)
        connections = Endpoint(self.engine_url, api_key=None, timeout_s=10.0, connections=64)
        try:
            with Heartbeat(self.database, lease_s=30.0, interval_s=5.0) as heartbeat:
                async with asyncio.timeout(120), connections as server:
                    context = FeedContext(
                        database=self.database,
                        heartbeat=heartbeat,
                        router=Router(engine=Route(server, places=64)),
                        settings=Settings.model_construct(cache=self.settings),
                        holder="test",
                        engine="engine",
                        worker="worker",
                        draining=lambda: False,
                        engine_id=lambda: self.engine_id,
                        cache=exact,
                        semantic=self.semantic,
                    )
                    return await feed(context)
        finally:
            exact.close()


def sources(database: Database, batch_id: UUID) -> Counter[str]:
    """How many results of a batch came from where."""
    with database.transaction() as session:
        return Counter(session.scalars(text("SELECT source FROM results WHERE batch_id = :id"), {"id": batch_id}))


def namespaces(database: Database) -> list[dict[str, Any]]:
    """All namespaces, as rows by column."""
    with database.transaction() as session:
        return [dict(row) for row in session.execute(text("SELECT * FROM cache_namespaces ORDER BY id")).mappings()]


def policy_of(database: Database) -> Policy:
    """The policy of the first namespace."""
    return Policy.decode(namespaces(database)[0]["policy"])
