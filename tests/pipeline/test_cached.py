"""The exact cache in a worker child: what is asked once, and what must be asked again."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import Route
from pipeline.cached import ExactCache
from pipeline.export import line
from pipeline.feed import FeedContext, FeedReport, feed
from pipeline.heartbeat import Heartbeat
from runtime.settings import CacheSettings, Settings
from store.answers import TENANT_SCOPE, delete_expired, raise_epoch
from store.batches import batch_progress
from store.database import Database
from store.engines import register_engine
from store.recent import RecentAnswers
from store.results import result_pages
from tests.support.batches import EMBEDDINGS, chat, dispatch_all, execute, results_of, store_batch
from tests.support.own_services import free_port
from tests.support.scripted_endpoint import ScriptedEndpoint

CHECKPOINT = {"kind": "vllm", "checkpoint_digest": "1234"}


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


def fed(
    database: Database,
    url: str,
    redis_url: str,
    *,
    checkpoint: dict[str, Any] = CHECKPOINT,
    cache: CacheSettings | None = None,
    embeddings_url: str | None = None,
) -> FeedReport:
    """What one call of feed does with an engine of this checkpoint, or with embeddings from elsewhere."""
    settings = cache or CacheSettings()
    with database.transaction() as session:
        engine_id = register_engine(session, checkpoint)

    async def run() -> FeedReport:
        connections = Endpoint(url, api_key=None, timeout_s=10.0, connections=8)
        recent = RecentAnswers(redis_url)
        exact = ExactCache(recent, settings, engine_id=lambda: engine_id, embeddings_url=embeddings_url)
        try:
            async with asyncio.timeout(20), connections as server:
                return await feed(
                    FeedContext(
                        database=database,
                        heartbeat=heartbeat,
                        router=Router(engine=Route(server, places=8)),
                        settings=Settings.model_construct(cache=settings),
                        holder="test",
                        engine="engine",
                        worker="worker",
                        draining=lambda: False,
                        engine_id=lambda: engine_id,
                        cache=exact,
                    )
                )
        finally:
            exact.close()

    with Heartbeat(database, lease_s=30.0, interval_s=5.0) as heartbeat:
        return asyncio.run(run())


def asked(count: int = 10, **fields: Any) -> list[dict[str, Any]]:
    return [chat(f"question {number}", **{"temperature": 0, **fields}) for number in range(count)]


def run(database: Database, folder: Path, bodies: list[dict[str, Any]], **options: Any) -> UUID:
    batch_id = store_batch(database, folder, bodies, **options)
    dispatch_all(database)
    return batch_id


def sources(database: Database, batch_id: UUID) -> list[str]:
    with database.transaction() as session:
        return list(
            session.scalars(text("SELECT source FROM results WHERE batch_id = :id ORDER BY seq"), {"id": batch_id})
        )


def test_the_second_batch_asks_the_engine_nothing_and_has_the_same_answers(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    first = run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    second = run(database, tmp_path, [dict(reversed(body.items())) | {"n": 1} for body in asked()])
    fed(database, endpoint.url, redis_url)
    assert endpoint.calls().count == 10
    assert sources(database, first) == ["engine"] * 10
    assert sources(database, second) == ["exact"] * 10
    assert [one.response for one in results_of(database, first)] == [r.response for r in results_of(database, second)]
    with database.transaction() as session:
        progress = batch_progress(session, second, tenant="local")
        before = batch_progress(session, first, tenant="local")
    assert (progress.served, progress.completion_tokens) == (10, 0)
    assert progress.saved_tokens == before.prompt_tokens + before.completion_tokens
    [page] = result_pages(database, second)
    stated = json.loads(line(second, page[0]))["stoker"]
    assert (stated["source"], stated["entry"]) == ("exact", page[0].entry)


@pytest.mark.parametrize(
    ("fields", "checkpoint"),
    [
        ({"max_tokens": 7}, CHECKPOINT),
        ({"seed": 3}, CHECKPOINT),
        ({"top_k": 3}, CHECKPOINT),
        ({}, {"kind": "vllm", "checkpoint_digest": "5678"}),
    ],
)
def test_what_could_change_an_answer_is_asked_again(
    database: Database,
    tmp_path: Path,
    endpoint: ScriptedEndpoint,
    redis_url: str,
    fields: dict[str, Any],
    checkpoint: dict[str, Any],
) -> None:
    run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    run(database, tmp_path, asked(**fields))
    fed(database, endpoint.url, redis_url, checkpoint=checkpoint)
    assert endpoint.calls().count == 20


def test_tenants_never_share_answers(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    other = run(database, tmp_path, asked(), tenant="other")
    fed(database, endpoint.url, redis_url)
    assert sources(database, other) == ["engine"] * 10


@pytest.mark.parametrize("fields", [{"temperature": 0.7}, {"temperature": None}, {"n": 2}, {"tools": [{}]}])
def test_requests_that_sample_or_ask_for_more_than_one_answer_are_not_cached(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str, fields: dict[str, Any]
) -> None:
    for _ in range(2):
        run(database, tmp_path, asked(2, **fields))
        fed(database, endpoint.url, redis_url)
    assert endpoint.calls().count == 4


def test_sampled_requests_are_cached_when_that_is_wished(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    for _ in range(2):
        run(database, tmp_path, asked(2, temperature=0.7))
        fed(database, endpoint.url, redis_url, cache=CacheSettings(sampled=True))
    assert endpoint.calls().count == 2


def test_answers_that_were_cut_or_refused_are_asked_again(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    bodies = [chat("a [[status 400]]", temperature=0), chat("b c d", temperature=0, max_tokens=1)]
    for _ in range(2):
        run(database, tmp_path, bodies)
        fed(database, endpoint.url, redis_url)
    assert endpoint.calls().count == 4


def test_a_body_or_answer_nested_too_deep_to_be_compared_runs_and_stops_nothing(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    nested: Any = 0
    for _ in range(700):
        nested = [nested]
    endpoint.script(f"[[answer {'[' * 300}1{']' * 300}]]", match="deep answer")
    batch_id = run(
        database, tmp_path, [chat("a", temperature=0, x=nested), chat("deep answer", temperature=0), *asked(2)]
    )
    fed(database, endpoint.url, redis_url)
    assert sources(database, batch_id) == ["engine"] * 4


def test_equal_requests_in_flight_in_two_workers_run_once(database: Database, tmp_path: Path, redis_url: str) -> None:
    with ScriptedEndpoint(latency_s=0.5) as slow:
        first, second = (store_batch(database, tmp_path, asked()) for _ in range(2))
        dispatch_all(database)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda _: fed(database, slow.url, redis_url), range(2)))
        while len(sources(database, first) + sources(database, second)) < 20:  # either may be the one that waits
            execute(database, "UPDATE job_tries SET not_before = now()")
            execute(database, "UPDATE shards SET not_before = now() WHERE state = 'pending'")
            dispatch_all(database)
            fed(database, slow.url, redis_url)
        assert slow.calls().count == 10
    both = Counter(sources(database, first) + sources(database, second))
    assert both == {"engine": 10, "exact": 10}


def test_who_waits_for_a_worker_that_died_runs_the_job_itself(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    batch_id = run(database, tmp_path, asked(2))
    recent = RecentAnswers(redis_url)
    fed(database, f"http://127.0.0.1:{free_port()}/v1", redis_url)  # takes the right to run, and reaches no engine
    with database.transaction() as session:
        assert session.execute(text("SELECT count(*) FROM results")).scalar_one() == 0
    other = run(database, tmp_path, asked(2), tenant="local")
    execute(database, "UPDATE shards SET not_before = now() WHERE state = 'pending'")
    dispatch_all(database)
    fed(database, endpoint.url, redis_url)
    recent.close()
    assert len(sources(database, batch_id)) == 2, "it is its own runner, also in a later attempt"
    assert endpoint.calls().count == 2
    assert len(sources(database, other)) in {0, 2}


def test_an_epoch_makes_all_answers_old(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    with database.transaction() as session:
        raise_epoch(session, "local", TENANT_SCOPE)
    run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    assert endpoint.calls().count == 20


def test_an_expired_answer_is_asked_again_and_replaced(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    run(database, tmp_path, asked())
    fed(database, endpoint.url, nowhere)
    execute(database, "UPDATE cache_entries SET expires_at = clock_timestamp()")
    run(database, tmp_path, asked(5))
    fed(database, endpoint.url, nowhere)
    assert endpoint.calls().count == 15
    run(database, tmp_path, asked(5))
    fed(database, endpoint.url, nowhere)
    assert endpoint.calls().count == 15, "Postgres alone has the new ones"
    with database.transaction() as session:
        assert delete_expired(session) is False
        assert session.scalar(text("SELECT count(*) FROM cache_entries")) == 5


def test_redis_that_is_down_or_emptied_costs_no_answer(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    second = run(database, tmp_path, asked())
    fed(database, endpoint.url, f"redis://127.0.0.1:{free_port()}/0")
    assert sources(database, second) == ["exact"] * 10


def test_a_redis_that_is_older_than_the_database_serves_nothing_of_another_life(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    execute(database, "DELETE FROM cache_entries")
    execute(database, "ALTER TABLE cache_entries ALTER COLUMN id RESTART")  # as in a new database
    run(database, tmp_path, asked(max_tokens=7))
    fed(database, endpoint.url, redis_url)
    third = run(database, tmp_path, asked())
    fed(database, endpoint.url, redis_url)
    assert sources(database, third) == ["engine"] * 10


def test_a_batch_may_do_without(database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str) -> None:
    for _ in range(2):
        batch_id = run(database, tmp_path, asked())
        execute(
            database,
            "UPDATE batches SET options = jsonb_set(options, '{cache}', '\"off\"') WHERE id = :id",
            id=batch_id,
        )
        fed(database, endpoint.url, redis_url)
    assert endpoint.calls().count == 20


def test_embeddings_are_cached_one_by_one(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    def bodies(count: int) -> list[dict[str, Any]]:
        return [{"model": "scripted", "input": f"text {number}"} for number in range(count)]

    run(database, tmp_path, bodies(5), endpoint=EMBEDDINGS)
    fed(database, endpoint.url, redis_url)
    second = run(database, tmp_path, bodies(8), endpoint=EMBEDDINGS)
    fed(database, endpoint.url, redis_url)
    assert sources(database, second) == ["exact"] * 5 + ["engine"] * 3


def test_embeddings_of_another_server_are_others(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, redis_url: str
) -> None:
    found = []
    for server in ("http://one/v1", "http://one/v1", "http://other/v1"):
        batch_id = run(database, tmp_path, [{"model": "scripted", "input": "a text"}], endpoint=EMBEDDINGS)
        fed(database, endpoint.url, redis_url, embeddings_url=server)
        found += sources(database, batch_id)
    assert found == ["engine", "exact", "engine"]


def test_a_runner_that_was_followed_by_another_ends_only_itself(redis_url: str) -> None:
    recent = RecentAnswers(redis_url)
    assert recent.begin({b"key": "second"}) == set()
    recent.end([(b"key", "first")])
    assert recent.begin({b"key": "third"}) == {b"key"}
    recent.end([(b"key", "first"), (b"key", "second")])
    assert recent.begin({b"key": "third"}) == set()
    recent.close()
