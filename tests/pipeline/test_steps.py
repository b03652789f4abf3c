"""Jobs of several requests in one worker child: each request is done once, whatever ends its attempt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import redis
from sqlalchemy import text

from models.jobs import Job, JobResult
from models.line_settings import LineSettings
from pipeline.steps import STEPS_AT_ONCE, StepFailed, Steps
from store.batches import request_cancel
from store.database import Database
from store.shards import Claim, recover_dead_leases
from store.step_states import STEPS_PREFIX
from store.steps import steps_of
from tests.support.batches import chat, dispatch_all, execute, results_of, shards_of
from tests.support.conversing import (
    NOBODY,
    Child,
    ShownEndpoint,
    answer,
    empty_redis,
    kept_steps,
    said,
    store_lines,
    talk,
    told_of,
)
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

RECIPE_LINE = {"body": chat("sum it up"), "stoker": {"recipe": "summarize", "document": 1}}
SLOW = "[[latency 0.7]]"


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


@pytest.fixture
def child(database: Database, endpoint: ScriptedEndpoint, redis_url: str) -> Child:
    return Child(database, endpoint.url, redis_url=redis_url)


def keys_in(redis_url: str) -> list[str]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        return list(client.scan_iter(f"{STEPS_PREFIX}*"))


def asked(endpoint: ScriptedEndpoint) -> dict[str, int]:
    """How often each turn came, by its first word."""
    return {prompt.split()[0]: count for prompt, count in endpoint.calls().prompts.items()}


def interrupt_at(child: Child, endpoint: ScriptedEndpoint, count: int, *, grace_s: float = 10.0) -> None:
    """Feed until so many requests have come, then drain."""
    drain = Event()
    with child.feeding(drain=drain, grace_s=grace_s) as running:
        wait_until(lambda: endpoint.calls().count == count, 10, f"{count} requests")
        drain.set()
        running.result(10)


def test_what_ended_with_its_job_is_kept_nowhere(
    child: Child, database: Database, tmp_path: Path, redis_url: str
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", "two [[latency 1.5]]"), {"body": chat("plain")}])
    with child.feeding() as running:
        wait_until(lambda: kept_steps(database, batch_id) == {"turn-1"}, 10, "the first turn is in Postgres")
        assert len(keys_in(redis_url)) == 1
        assert running.result(10).jobs == 2
    assert kept_steps(database, batch_id) == set()
    assert keys_in(redis_url) == []


def test_a_drained_attempt_keeps_its_turns_and_the_next_one_asks_only_the_rest(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", f"two {SLOW}", "three", "four")])
    interrupt_at(child, endpoint, 2)
    assert (results_of(database, batch_id), shards_of(database, batch_id)[0].state) == ([], "pending")
    assert kept_steps(database, batch_id) == {"turn-1", "turn-2"}
    assert child.feed_again().jobs == 1
    assert asked(endpoint) == {"one": 1, "two": 1, "three": 1, "four": 1}
    assert said(told_of(database, batch_id))[1::2] == ["echo: one", f"echo: two {SLOW}", "echo: three", "echo: four"]
    with database.transaction() as session:
        tokens = session.execute(text("SELECT completion_tokens FROM results")).scalar_one()
    assert tokens == 2 + 4 + 2 + 2, "of all turns, whoever asked them"


def test_a_cancelled_batch_stops_between_two_turns(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", f"two {SLOW}", "three")])
    with child.feeding(heartbeat_s=0.1) as running:
        wait_until(lambda: endpoint.calls().count == 2, 10, "the second turn")
        with database.transaction() as session:
            assert request_cancel(session, batch_id)
        assert running.result(10).jobs == 0
    assert asked(endpoint) == {"one": 1, "two": 1}
    assert shards_of(database, batch_id)[0].state == "pending"


def test_redis_emptied_in_the_middle_costs_nothing_that_postgres_has(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path, redis_url: str
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", "two", "three [[latency 1.5]]", "four")])
    drain = Event()
    with child.feeding(drain=drain, grace_s=0.1) as running:
        wait_until(lambda: kept_steps(database, batch_id) == {"turn-1", "turn-2"}, 10, "two turns in Postgres")
        empty_redis(redis_url)
        drain.set()
        running.result(10)
    child.feed_again()
    assert asked(endpoint) == {"one": 1, "two": 1, "three": 2, "four": 1}


def test_what_only_redis_has_is_used_and_written(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path, redis_url: str
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", "two [[latency 1.5]]", "three [[latency 1.5]]")])
    interrupt_at(child, endpoint, 2, grace_s=0.1)
    execute(database, "DELETE FROM job_steps")  # as if it had been killed before it wrote
    dispatch_all(database)
    drain = Event()
    with child.feeding(drain=drain, grace_s=0.1) as running:
        wait_until(lambda: kept_steps(database, batch_id) == {"turn-1"}, 10, "it is in Postgres before the next turn")
        empty_redis(redis_url)
        drain.set()
        running.result(10)
    child.feed_again()
    assert (asked(endpoint)["one"], asked(endpoint)["three"]) == (1, 1)


def test_without_redis_it_goes_on_from_postgres(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    child.redis_url = NOBODY
    batch_id = store_lines(database, tmp_path, [talk("one", f"two {SLOW}", "three")])
    interrupt_at(child, endpoint, 2)
    child.feed_again()
    assert asked(endpoint) == {"one": 1, "two": 1, "three": 1}
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded"]


def test_a_zombie_and_its_successor_converge_on_one_history(database: Database, tmp_path: Path, redis_url: str) -> None:
    late, go_on = Event(), Event()

    def reply(number: int, body: dict[str, Any]) -> dict[str, Any]:
        if number == 1:
            late.set()
            assert go_on.wait(10)
        return answer(f"reply {number}")

    with ShownEndpoint(reply) as endpoint:
        child = Child(database, endpoint.url, redis_url=redis_url)
        batch_id = store_lines(database, tmp_path, [talk("one", "two", "three")])
        with child.feeding(heartbeat_s=60.0, in_flight=1) as zombie:
            assert late.wait(10)
            execute(database, "UPDATE shards SET lease_until = clock_timestamp() - interval '1 s'")
            with database.transaction() as session:
                assert len(recover_dead_leases(session, lease_s=1.0)) == 1
            dispatch_all(database)
            successor = Child(database, endpoint.url, redis_url=redis_url)
            with successor.feeding() as running:
                wait_until(lambda: len(endpoint.bodies) >= 2, 10, "the successor asks")
                wait_until(lambda: keys_in(redis_url) or running.done(), 10, "its first turn is kept")
                go_on.set()
                assert running.result(10).jobs == 1
            assert zombie.result(10).jobs == 0
    history = said(told_of(database, batch_id))
    assert history[:2] == ["one", "reply 2"], "the first that was kept"
    for body in endpoint.bodies:
        texts = [message["content"] for message in body["messages"]]
        assert texts == history[: len(texts)], "also the zombie's"


def test_a_transient_failure_of_a_turn_is_a_try_of_its_job(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", "two [[fail 1 times]]", "three")])
    assert child.feed().jobs == 0
    with database.transaction() as session:
        assert session.execute(text("SELECT tries FROM job_tries")).scalar_one() == 1
    assert child.feed_again().jobs == 1
    assert asked(endpoint) == {"one": 1, "two": 2, "three": 1}
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded"]


def test_a_shard_that_runs_alone_finds_its_steps_and_those_of_its_halves_do_too(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path, redis_url: str
) -> None:
    batch_id = store_lines(
        database, tmp_path, [talk("one", f"two {SLOW}", "three"), talk("four", f"five {SLOW}", "six")]
    )
    interrupt_at(child, endpoint, 4)
    empty_redis(redis_url)
    execute(database, "UPDATE shards SET crashes = 2, seqs = '{0}'")
    execute(
        database,
        "INSERT INTO shards (batch_id, seqs, tokens, not_before, quarantined) "
        "SELECT batch_id, '{1}', 1, clock_timestamp(), true FROM shards",
    )
    execute(database, "UPDATE batches SET shards_left = 2")
    dispatch_all(database)
    while len(results_of(database, batch_id)) < 2:
        assert child.feed_again().jobs == 1
    assert asked(endpoint) == dict.fromkeys(("one", "two", "three", "four", "five", "six"), 1)


def test_pace_hears_of_requests_not_of_conversations(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    store_lines(database, tmp_path, [talk(*(f"{turn} [[latency 0.2]]" for turn in range(5)))])
    child.feed()
    assert 0.2 <= child.pace.service_s < 0.5


async def parts(steps: Steps, job: Job, settings: LineSettings, claim: Claim) -> JobResult:
    """A recipe that asks for ten parts side by side, and then for their sum."""
    prompts = json.loads(job.body)["messages"][0]["content"].split("|")
    replies = await asyncio.gather(*(steps.ask(f"part-{n}", chat(prompt)) for n, prompt in enumerate(prompts)))
    whole = await steps.ask("whole", chat(" ".join(reply.text for reply in replies)))
    return steps.result(whole, stoker='{"parts": 10}')


def recipe_line(prompts: list[str]) -> dict[str, Any]:
    return RECIPE_LINE | {"body": chat("|".join(prompts))}


def test_a_few_steps_of_one_job_are_in_flight_at_once(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    batch_id = store_lines(database, tmp_path, [recipe_line([f"{n} [[latency 0.1]]" for n in range(10)])])
    assert child.feed(recipes=parts, in_flight=16).jobs == 1
    assert (endpoint.calls().count, endpoint.calls().most_running) == (11, STEPS_AT_ONCE)
    with database.transaction() as session:
        assert session.execute(text("SELECT stoker FROM results")).scalar_one() == '{"parts": 10}'
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded"]


def test_a_stopped_job_waits_for_its_steps_in_flight_and_keeps_them(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    store_lines(database, tmp_path, [recipe_line([f"{n} {SLOW}" for n in range(10)])])
    drain = Event()
    with child.feeding(recipes=parts, drain=drain) as running:
        wait_until(lambda: endpoint.calls().running == STEPS_AT_ONCE, 10, "steps in flight")
        drain.set()
        assert running.result(10).jobs == 0
    assert endpoint.calls().count == STEPS_AT_ONCE
    assert child.feed_again(recipes=parts).jobs == 1
    assert endpoint.calls().count == 11


def test_a_refused_step_abandons_the_others_of_its_job(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    prompts = ["bad [[status 400]]", *(f"{n} [[hang]]" for n in range(9))]
    batch_id = store_lines(database, tmp_path, [recipe_line(prompts)])
    assert child.feed(recipes=parts).jobs == 1
    [result] = results_of(database, batch_id)
    assert (result.outcome, result.status_code) == ("failed", 400)
    wait_until(lambda: endpoint.calls().running == 0, 5, "the requests are cancelled")
    assert endpoint.calls().count <= STEPS_AT_ONCE + 1


def test_a_recipe_that_this_worker_does_not_have_is_an_error(
    child: Child, endpoint: ScriptedEndpoint, database: Database, tmp_path: Path
) -> None:
    batch_id = store_lines(database, tmp_path, [RECIPE_LINE])
    child.feed()
    [result] = results_of(database, batch_id)
    assert (result.outcome, result.error_code, endpoint.calls().count) == ("failed", "recipe_unavailable", 0)


def test_a_request_that_fails_for_good_ends_its_job_with_the_tokens_of_those_before(
    child: Child, database: Database, tmp_path: Path
) -> None:
    async def two(steps: Steps, job: Job, settings: LineSettings, claim: Claim) -> JobResult:
        await steps.ask("first", chat("one two three"))
        with pytest.raises(StepFailed):
            await steps.ask("second", chat("[[not json]]"))
        return steps.failed(code="no_second", message="the second step failed")

    batch_id = store_lines(database, tmp_path, [RECIPE_LINE])
    child.feed(recipes=two)
    [result] = results_of(database, batch_id)
    assert (result.outcome, result.error_code) == ("failed", "no_second")
    with database.transaction() as session:
        assert session.execute(text("SELECT prompt_tokens FROM results")).scalar_one() == 3
        assert steps_of(session, batch_id, [0]) == {}
