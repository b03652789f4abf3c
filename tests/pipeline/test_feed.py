"""One worker child against the scripted endpoint and Postgres, without broker or Celery."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

import pipeline.feed as feeding
from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import Route
from pipeline.feed import FeedContext, FeedReport, feed
from pipeline.heartbeat import Heartbeat
from pipeline.pace import Pace
from runtime.clock import utc_now
from runtime.settings import EmbeddingsSettings, LimitSettings, Settings, WorkerSettings
from store.batches import request_cancel
from store.database import Database
from store.shards import recover_dead_leases
from tests.support.batches import (
    EMBEDDINGS,
    chat,
    chats,
    dispatch_all,
    execute,
    results_of,
    shards_of,
    store_batch,
)
from tests.support.scripted_answers import vector_of
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

FEED_TIMEOUT_S = 20.0
NEVER = Event()


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


def fed(
    database: Database,
    url: str,
    *,
    in_flight: int = 8,
    timeout_s: float = 10.0,
    max_tries: int = 8,
    heartbeat_s: float = 5.0,
    grace_s: float = 10.0,
    yield_s: float = 600.0,
    drain: Event = NEVER,
    pack_inputs: int = 128,
    pace: Pace | None = None,
) -> FeedReport:
    """What one call of feed does; an error if it takes longer than 20 s."""
    settings = Settings.model_construct(
        worker=WorkerSettings(heartbeat_s=heartbeat_s, grace_s=grace_s, yield_s=yield_s),
        limits=LimitSettings(max_tries=max_tries),
        embeddings=EmbeddingsSettings(pack_inputs=pack_inputs),
    )

    async def run() -> FeedReport:
        connections = Endpoint(url, api_key=None, timeout_s=timeout_s, connections=in_flight)
        async with asyncio.timeout(FEED_TIMEOUT_S), connections as server:
            return await feed(
                FeedContext(
                    database=database,
                    heartbeat=heartbeat,
                    router=Router(engine=Route(server, places=in_flight)),
                    settings=settings,
                    holder="test",
                    engine="engine",
                    worker="worker",
                    draining=drain.is_set,
                    engine_id=lambda: None,
                    pace=pace or Pace(),
                )
            )

    with Heartbeat(database, lease_s=settings.worker.lease_s, interval_s=heartbeat_s) as heartbeat:
        return asyncio.run(run())


@contextmanager
def being_fed(step: Callable[[], FeedReport]) -> Iterator[Future[FeedReport]]:
    """A feed in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(step)


def stored(database: Database, folder: Path, prompts: list[str], **options: Any) -> tuple[UUID, list[int]]:
    """A batch of chats with its shards dispatched."""
    batch_id = store_batch(database, folder, [chat(prompt) for prompt in prompts], **options)
    return batch_id, dispatch_all(database)


def tries_of(database: Database, batch_id: UUID) -> list[tuple[int, int, datetime, str]]:
    with database.transaction() as session:
        rows = session.execute(
            text("SELECT seq, tries, not_before, last_error FROM job_tries WHERE batch_id = :id ORDER BY seq"),
            {"id": batch_id},
        ).all()
    return [(seq, tries, due, error) for seq, tries, due, error in rows]


def dispatch_now(database: Database) -> list[int]:
    """Dispatch what waits for a later try as if its time had come."""
    execute(database, "UPDATE job_tries SET not_before = clock_timestamp()")
    execute(database, "UPDATE shards SET not_before = clock_timestamp() WHERE not_before IS NOT NULL")
    return dispatch_all(database)


def test_every_job_gets_the_answer_to_its_own_prompt(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id = store_batch(database, tmp_path, chats(100), shard_jobs=40)
    dispatch_all(database)
    assert fed(database, endpoint.url) == FeedReport(shards=3, jobs=100)
    results = results_of(database, batch_id)
    contents = [json.loads(result.response or "")["choices"][0]["message"]["content"] for result in results]
    assert contents == [f"echo: question {number}" for number in range(100)]
    assert {shard.state for shard in shards_of(database, batch_id)} == {"done"}
    assert endpoint.calls().count == 100


def test_a_shard_that_somebody_else_has_is_left_alone(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["hello"])
    execute(database, "UPDATE shards SET state = 'running', holder = 'other'")
    assert fed(database, endpoint.url) == FeedReport()
    assert (endpoint.calls().count, results_of(database, batch_id)) == (0, [])


def test_no_more_jobs_are_in_flight_than_allowed(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    stored(database, tmp_path, [f"{number} [[latency 0.05]]" for number in range(12)])
    fed(database, endpoint.url, in_flight=3)
    assert endpoint.calls().most_running == 3


def test_a_429_is_tried_again_later_and_then_succeeds(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, [shard_id] = stored(database, tmp_path, ["one", "two [[fail 1 times]] [[status 429 retry-after 30]]"])
    before = utc_now()
    assert fed(database, endpoint.url).jobs == 1
    [(seq, tries, due, error)] = tries_of(database, batch_id)
    assert (seq, tries, "429" in error) == (1, 1, True)
    assert (due - before).total_seconds() >= 30
    assert shards_of(database, batch_id)[0].state == "pending"
    assert dispatch_all(database) == [], "the shard waits with its job"
    assert dispatch_now(database) == [shard_id]
    assert fed(database, endpoint.url).jobs == 1
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded", "succeeded"]
    assert (shards_of(database, batch_id)[0].state, shards_of(database, batch_id)[0].crashes) == ("done", 0)


def test_a_job_whose_tries_are_spent_ends_with_an_error(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["always [[status 503]]"])
    for _ in range(3):
        assert results_of(database, batch_id) == []
        fed(database, endpoint.url, max_tries=3)
        dispatch_now(database)
    [result] = results_of(database, batch_id)
    assert (result.outcome, result.error_code, "3 times" in (result.error_message or "")) == (
        "failed",
        "retries_exhausted",
        True,
    )
    assert endpoint.calls().count == 3
    assert shards_of(database, batch_id)[0].failed == 1


def test_a_job_with_settings_of_a_newer_version_waits_for_a_worker_of_it_and_counts_no_try(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["newer", "plain"])
    execute(database, """UPDATE jobs SET stoker = '{"invented_later": 1}' WHERE seq = 0""")
    fed(database, endpoint.url)
    assert [result.seq for result in results_of(database, batch_id)] == [1]
    ((seq, tries, due, error),) = tries_of(database, batch_id)
    assert (seq, tries) == (0, 0) and due > utc_now()
    assert "waits for a worker of the version that took it in" in error and "invented_later" in error
    assert [(shard.state, shard.crashes) for shard in shards_of(database, batch_id)] == [("pending", 0)]

    execute(database, "UPDATE jobs SET stoker = NULL")  # as a newer worker reads it
    dispatch_now(database)
    fed(database, endpoint.url)
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded"] * 2


def test_a_rejection_is_the_result_with_status_and_body(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["bad [[status 400]]", "good"])
    fed(database, endpoint.url)
    bad, good = results_of(database, batch_id)
    assert (bad.outcome, bad.status_code, good.outcome) == ("failed", 400, "succeeded")
    assert json.loads(bad.response or "")["error"]["message"] == "as the script says"
    assert (endpoint.calls().count, tries_of(database, batch_id)) == (2, [])


def test_a_request_without_an_answer_in_time_ends_as_timeout(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["slow [[hang]]", "good"])
    fed(database, endpoint.url, timeout_s=0.3)
    slow, good = results_of(database, batch_id)
    assert (slow.outcome, slow.error_code, good.outcome) == ("failed", "timeout", "succeeded")


@pytest.mark.parametrize("order", ["drop connection", "drop mid-body"])
def test_a_broken_connection_is_a_try(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, order: str
) -> None:
    batch_id, _ = stored(database, tmp_path, [f"broken [[{order}]]", "good"])
    assert fed(database, endpoint.url).jobs == 1
    assert [(seq, tries) for seq, tries, _, _ in tries_of(database, batch_id)] == [(0, 1)]
    assert [result.seq for result in results_of(database, batch_id)] == [1]


def test_empty_and_truncated_answers_are_counted(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    bodies = [chat("nothing [[empty]]"), chat("a long question", max_tokens=2), chat("whole"), chat("x [[status 422]]")]
    batch_id = store_batch(database, tmp_path, bodies)
    dispatch_all(database)
    fed(database, endpoint.url)
    assert [result.outcome for result in results_of(database, batch_id)] == [
        "empty",
        "truncated",
        "succeeded",
        "failed",
    ]
    [shard] = shards_of(database, batch_id)
    assert (shard.done, shard.empty, shard.truncated, shard.failed) == (4, 1, 1, 1)


def test_a_refused_connection_gives_the_shard_back_untouched(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, [shard_id] = stored(database, tmp_path, [f"question {number}" for number in range(30)])
    endpoint.kill()
    assert fed(database, endpoint.url) == FeedReport(shards=1, jobs=0)
    [shard] = shards_of(database, batch_id)
    assert (shard.state, shard.done, shard.crashes) == ("pending", 0, 0)
    assert (tries_of(database, batch_id), results_of(database, batch_id)) == ([], [])
    endpoint.start()
    assert dispatch_now(database) == [shard_id]
    assert fed(database, endpoint.url).jobs == 30


def test_the_next_shard_is_claimed_while_a_slow_job_is_in_flight(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["slow [[latency 2]]", "b", "c", "d", "e"], shard_jobs=1)
    assert fed(database, endpoint.url, in_flight=2) == FeedReport(shards=5, jobs=5)
    with database.transaction() as session:
        order = session.scalars(text("SELECT seq FROM results ORDER BY created_at, seq")).all()
    assert order[-1] == 0, "the others were written while the slow one ran"
    assert endpoint.calls().most_running == 2
    assert {shard.state for shard in shards_of(database, batch_id)} == {"done"}


def test_no_shard_is_claimed_while_enough_waits(database: Database, tmp_path: Path, endpoint: ScriptedEndpoint) -> None:
    batch_id, _ = stored(database, tmp_path, [f"{number} [[latency 0.4]]" for number in range(12)], shard_jobs=6)
    with being_fed(lambda: fed(database, endpoint.url, in_flight=2)) as running:
        wait_until(lambda: len(results_of(database, batch_id)) >= 2, 10, "the first answers")
        assert [shard.state for shard in shards_of(database, batch_id)] == ["running", "dispatched"]
        assert running.result(10).jobs == 12


def test_no_shard_is_claimed_while_large_bodies_fill_the_memory(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "HELD_BYTES", 150_000)
    prompts = [f"{number} [[latency 0.3]] {'x' * 100_000}" for number in range(8)]
    stored(database, tmp_path, prompts, shard_jobs=1)
    pace = Pace()
    pace.served(0.1)
    assert fed(database, endpoint.url, pace=pace).jobs == 8
    assert endpoint.calls().most_running == 2


def test_no_shard_is_claimed_by_a_draining_feed(database: Database, tmp_path: Path, endpoint: ScriptedEndpoint) -> None:
    batch_id, _ = stored(database, tmp_path, [f"{number} [[latency 0.7]]" for number in range(9)], shard_jobs=3)
    drain = Event()
    with being_fed(lambda: fed(database, endpoint.url, in_flight=3, drain=drain)) as running:
        wait_until(lambda: endpoint.calls().running == 3, 10, "the first shard in flight")
        drain.set()
        assert running.result(5) == FeedReport(shards=1, jobs=3)
    assert [shard.fence for shard in shards_of(database, batch_id)][1:] == [0, 0]


def test_no_shard_is_claimed_beside_one_that_runs_alone(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["quick", "slow [[latency 1.5]]", "c", "d"], shard_jobs=2)
    execute(database, "UPDATE shards SET crashes = 2 WHERE id = (SELECT min(id) FROM shards)")
    with being_fed(lambda: fed(database, endpoint.url)) as running:
        wait_until(lambda: len(results_of(database, batch_id)) >= 1, 10, "the first answer")
        assert [shard.state for shard in shards_of(database, batch_id)] == ["running", "dispatched"]
        assert running.result(10) == FeedReport(shards=1, jobs=2)


def test_only_what_the_engine_did_says_how_long_jobs_take(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    pace = Pace()
    stored(database, tmp_path, ["slow [[latency 0.3]]", *(f"{number} [[status 400]]" for number in range(60))])
    fed(database, endpoint.url, in_flight=64, pace=pace)
    assert 0.3 <= pace.service_s < 0.6


def test_a_feed_whose_fence_is_lost_writes_nothing_more(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, [f"{number} [[latency 1.5]]" for number in range(4)])
    with being_fed(lambda: fed(database, endpoint.url, heartbeat_s=60.0)) as running:
        wait_until(lambda: endpoint.calls().running == 4, 10, "all jobs in flight")
        recover_by_hand(database)
        assert running.result(FEED_TIMEOUT_S).jobs == 0
    assert results_of(database, batch_id) == []
    assert (shards_of(database, batch_id)[0].state, shards_of(database, batch_id)[0].done) == ("pending", 0)


def test_the_heartbeat_tells_a_feed_that_its_fence_is_lost(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    stored(database, tmp_path, ["[[hang]]"])
    with being_fed(lambda: fed(database, endpoint.url, heartbeat_s=0.1)) as running:
        wait_until(lambda: endpoint.calls().running == 1, 10, "the job in flight")
        recover_by_hand(database)
        assert running.result(5) == FeedReport(shards=1, jobs=0)
    wait_until(lambda: endpoint.calls().running == 0, 5, "the request is cancelled")


def test_a_cancelled_batch_starts_no_new_job_and_keeps_what_was_in_flight(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, [f"{number} [[latency 0.7]]" for number in range(10)])
    with being_fed(lambda: fed(database, endpoint.url, in_flight=2, heartbeat_s=0.1)) as running:
        wait_until(lambda: endpoint.calls().running == 2, 10, "two jobs in flight")
        with database.transaction() as session:
            assert request_cancel(session, batch_id)
        assert running.result(5).jobs == 2
    assert (len(results_of(database, batch_id)), endpoint.calls().count) == (2, 2)
    assert shards_of(database, batch_id)[0].state == "pending"


def test_a_draining_feed_writes_what_is_in_flight_and_gives_back_the_rest(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, [shard_id] = stored(database, tmp_path, [f"{number} [[latency 0.7]]" for number in range(10)])
    drain = Event()
    with being_fed(lambda: fed(database, endpoint.url, in_flight=3, drain=drain)) as running:
        wait_until(lambda: endpoint.calls().running == 3, 10, "three jobs in flight")
        drain.set()
        assert running.result(5) == FeedReport(shards=1, jobs=3)
    assert (len(results_of(database, batch_id)), endpoint.calls().count) == (3, 3)
    assert dispatch_all(database) == [shard_id], "given back at once"


def test_a_draining_feed_waits_no_longer_than_its_grace(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, ["quick", "never [[hang]]"])
    drain = Event()
    with being_fed(lambda: fed(database, endpoint.url, drain=drain, grace_s=0.3)) as running:
        wait_until(lambda: len(results_of(database, batch_id)) == 1, 10, "the quick job is written")
        drain.set()
        assert running.result(5) == FeedReport(shards=1, jobs=1)
    [shard] = shards_of(database, batch_id)
    assert (shard.state, shard.done, tries_of(database, batch_id)) == ("pending", 1, [])


def test_a_feed_that_ran_long_enough_gives_back_the_rest(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored(database, tmp_path, [f"{number} [[latency 0.3]]" for number in range(20)])
    report = fed(database, endpoint.url, in_flight=2, yield_s=0.8)
    assert 0 < report.jobs < 20
    assert (shards_of(database, batch_id)[0].state, len(results_of(database, batch_id))) == ("pending", report.jobs)


def test_embeddings_are_asked_together_and_split_for_their_jobs(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    texts = [f"text {number}" for number in range(10)]
    batch_id, _ = stored_embeddings(database, tmp_path, texts)
    assert fed(database, endpoint.url, pack_inputs=5).jobs == 10
    assert endpoint.calls().count == 2
    for result, said in zip(results_of(database, batch_id), texts, strict=True):
        [item] = json.loads(result.response or "")["data"]
        assert (item["index"], item["embedding"]) == (0, pytest.approx(vector_of(said), abs=1e-6))


def test_one_bad_text_fails_alone_and_its_pack_is_asked_one_by_one(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored_embeddings(database, tmp_path, ["a", "b [[status 400]]", "c"])
    drain = Event()
    with being_fed(lambda: fed(database, endpoint.url, drain=drain, in_flight=1, grace_s=0.1)) as running:
        try:
            wait_until(lambda: running.done() or endpoint.calls().count > 12, 15, "the feed ends")
            assert endpoint.calls().count == 4, "the pack once, then each of its three jobs once"
        finally:
            drain.set()
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded", "failed", "succeeded"]
    assert [result.status_code for result in results_of(database, batch_id)] == [200, 400, 200]


def test_a_rejected_pack_is_not_asked_one_by_one_once_the_worker_drains(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    stored_embeddings(database, tmp_path, ["a", "b [[latency 0.6]] [[status 400]]", "c"])
    drain = Event()
    with being_fed(lambda: fed(database, endpoint.url, drain=drain, grace_s=5)) as running:
        wait_until(lambda: endpoint.calls().running == 1, 10, "the pack in flight")
        drain.set()
        running.result(FEED_TIMEOUT_S)
    assert endpoint.calls().count == 1


def test_a_rejected_pack_is_not_asked_one_by_one_once_its_batch_is_cancelled(
    database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    batch_id, _ = stored_embeddings(database, tmp_path, ["a", "b [[latency 1.5]] [[status 400]]", "c"])
    with being_fed(lambda: fed(database, endpoint.url, heartbeat_s=1.0)) as running:
        wait_until(lambda: endpoint.calls().running == 1, 10, "the pack in flight")
        with database.transaction() as session:
            assert request_cancel(session, batch_id)
        running.result(FEED_TIMEOUT_S)
    assert endpoint.calls().count == 1


def stored_embeddings(database: Database, folder: Path, texts: list[str]) -> tuple[UUID, int]:
    bodies = [{"model": "scripted", "input": said} for said in texts]
    batch_id = store_batch(database, folder, bodies, endpoint=EMBEDDINGS)
    [shard_id] = dispatch_all(database)
    return batch_id, shard_id


def recover_by_hand(database: Database) -> None:
    """What the leader does after a lease ran out, in one transaction: no heartbeat comes between."""
    with database.transaction() as session:
        session.execute(text("UPDATE shards SET lease_until = clock_timestamp() - interval '1 s'"))
        assert len(recover_dead_leases(session, lease_s=1.0)) == 1
