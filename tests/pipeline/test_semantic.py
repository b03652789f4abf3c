"""The semantic cache in a worker child, on real Postgres, Redis and Chroma: what it serves and what never."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from cache.index import Index
from cache.policy import Policy
from inference.endpoint import Endpoint
from pipeline.cached import ExactCache
from pipeline.feed import FeedContext, feed
from pipeline.heartbeat import Heartbeat
from pipeline.semantic import SemanticCache
from runtime.settings import CacheSettings, Settings
from store.batches import batch_progress
from store.database import Database
from store.engines import register_engine
from store.recent import RecentAnswers
from tests.support.batches import chat, dispatch_all, execute, results_of, store_batch
from tests.support.own_services import OwnChroma, server_folder
from tests.support.queries import TOPICS, TopicEmbedder, queries
from tests.support.scripted_endpoint import ScriptedEndpoint

PREFIX = "Say in one word what this is about.\n\nMessage: "
SUFFIX = "\n\nOne word of refund, card, transfer, login:"
ENOUGH = 2_400  # lookups by which these easy queries are certified


@pytest.fixture(scope="module")
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    """An engine that says the topic of a query."""
    with ScriptedEndpoint() as server:
        for topic in TOPICS:
            server.script(f"[[answer {topic}]]", match=f" {topic}\n\nOne")
        yield server


class Child:
    """A worker child whose parts a test may take away."""

    def __init__(self, database: Database, engine_url: str, redis_url: str, chroma_url: str) -> None:
        self.database = database
        self.engine_url = engine_url
        self.redis_url = redis_url
        self.settings = CacheSettings(chroma_url=chroma_url)
        self.embedder = TopicEmbedder()
        with database.transaction() as session:
            self.engine_id = register_engine(session, {"checkpoint_digest": "1234"})
        self.semantic = self._semantic()

    def restart(self) -> None:
        """As a new process: it remembers nothing."""
        self.semantic = self._semantic()

    def feed(self) -> None:
        """Run all that is dispatched."""
        asyncio.run(self._feed())

    def _semantic(self) -> SemanticCache:
        return SemanticCache(
            self.database,
            Index(self.settings.chroma_url or ""),
            self.embedder,
            settings=self.settings,
            engine_id=lambda: self.engine_id,
            lease_s=30.0,
        )

    async def _feed(self) -> None:
        exact = ExactCache(RecentAnswers(self.redis_url), self.settings, engine_id=lambda: self.engine_id)
        connections = Endpoint(self.engine_url, api_key=None, timeout_s=10.0, connections=64)
        with Heartbeat(self.database, lease_s=30.0, interval_s=5.0) as heartbeat:
            async with asyncio.timeout(120), connections as server:
                context = FeedContext(
                    database=self.database,
                    heartbeat=heartbeat,
                    generation=server,
                    embeddings=server,
                    settings=Settings.model_construct(cache=self.settings),
                    holder="test",
                    engine="engine",
                    worker="worker",
                    in_flight=64,
                    draining=lambda: False,
                    engine_id=lambda: self.engine_id,
                    cache=exact,
                    semantic=self.semantic,
                )
                await feed(context)
        exact.close()


@pytest.fixture
def child(database: Database, endpoint: ScriptedEndpoint, redis_url: str, chroma: OwnChroma) -> Child:
    return Child(database, endpoint.url, redis_url, chroma.url)


def run(
    child: Child, folder: Path, asked: list[str], *, mode: str = "semantic", tenant: str = "local", **fields: Any
) -> UUID:
    bodies = [chat(f"{PREFIX}{one}{SUFFIX}", **{"temperature": 0, "max_tokens": 8, **fields}) for one in asked]
    batch_id = store_batch(child.database, folder, bodies, tenant=tenant)
    options = {"cache": mode, "affixes": {"prefix": PREFIX, "suffix": SUFFIX}}
    execute(
        child.database,
        "UPDATE batches SET options = options || CAST(:new AS jsonb) WHERE id = :id",
        new=json.dumps(options),
        id=batch_id,
    )
    dispatch_all(child.database)
    child.feed()
    return batch_id


def sources(database: Database, batch_id: UUID) -> Counter[str]:
    with database.transaction() as session:
        return Counter(session.scalars(text("SELECT source FROM results WHERE batch_id = :id"), {"id": batch_id}))


def namespace(database: Database) -> dict[str, Any]:
    with database.transaction() as session:
        return dict(session.execute(text("SELECT * FROM cache_namespaces")).mappings().one())


def policy(database: Database) -> Policy:
    return Policy.decode(namespace(database)["policy"])


def test_a_certified_namespace_serves_right_answers_and_says_from_where(
    child: Child, tmp_path: Path, database: Database, endpoint: ScriptedEndpoint
) -> None:
    asked = queries(ENOUGH + 400)
    first = run(child, tmp_path, asked[:ENOUGH])
    second = run(child, tmp_path, asked[ENOUGH:])
    assert policy(database).is_serving, policy(database).state()
    counts = sources(database, second)
    assert counts["semantic"] > 200
    assert counts["semantic"] + counts["engine"] == 400
    for one, query in zip(results_of(database, second), asked[ENOUGH:], strict=True):
        assert query.split()[-1] in (one.response or "")
    with database.transaction() as session:
        progress = batch_progress(session, second, tenant="local")
        rows = session.execute(
            text("""
            SELECT r.similarity, r.namespace_id, e.namespace_id FROM results r JOIN cache_entries e
            ON e.id = r.cache_entry_id WHERE r.batch_id = :id AND r.source = 'semantic'"""),
            {"id": second},
        ).all()
    assert progress.served == counts["semantic"]
    assert progress.saved_tokens > 0
    assert all(similarity > 0.5 and mine == its for similarity, mine, its in rows)
    known = namespace(database)
    assert known["served"] == counts["semantic"] + sources(database, first)["semantic"]
    assert known["lookups"] == ENOUGH + 400
    assert known["asked_twice"] >= 200
    assert known["differed"] == 0
