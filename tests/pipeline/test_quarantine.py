"""Isolating the job that kills its engine, on a scripted endpoint that really dies and is started again."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.jobs import Job
from pipeline.quarantine import DEATHS_ALONE, isolate
from store.database import Database
from tests.pipeline.test_feed import being_fed, fed, stored
from tests.support.batches import claimed, dispatch_all, execute, results_of, shards_of
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until


@given(st.integers(1, 200), st.data())
def test_one_killer_among_many_is_convicted_alone_within_the_stated_number_of_deaths(
    count: int, data: st.DataObject
) -> None:
    killer = data.draw(st.integers(0, count - 1))
    deaths = 0
    done: list[int] = []
    convicted: list[tuple[int, int]] = []
    running: set[int] = set()

    async def survives(job: Job) -> bool:
        nonlocal deaths
        running.add(job.seq)
        await asyncio.sleep(0)
        killed = killer in running
        await asyncio.sleep(0)
        if job.seq == killer:
            deaths += 1
        running.discard(job.seq)
        if not killed:
            done.append(job.seq)
        return not killed

    async def engine_is_up() -> bool:
        return True

    asyncio.run(
        isolate(
            [Job(seq, "", 0) for seq in range(count)],
            survives=survives,
            engine_is_up=engine_is_up,
            convict=lambda job, times: convicted.append((job.seq, times)),
        )
    )
    assert convicted == [(killer, DEATHS_ALONE)]
    assert sorted([*done, killer]) == list(range(count))
    assert deaths <= math.ceil(math.log2(count)) + DEATHS_ALONE


@given(st.integers(1, 64), st.lists(st.booleans(), max_size=12))
def test_deaths_at_random_convict_nobody_unless_three_in_a_row_hit_one_job_alone(
    count: int, accidents: list[bool]
) -> None:
    runs = iter(accidents)
    convicted: list[int] = []
    alone_in_a_row = most = 0
    group: set[int] = set()
    dies = False

    async def survives(job: Job) -> bool:
        group.add(job.seq)
        await asyncio.sleep(0)
        return not dies

    async def engine_is_up() -> bool:
        nonlocal dies, alone_in_a_row, most
        alone_in_a_row = alone_in_a_row + 1 if len(group) == 1 and dies else 0
        most = max(most, alone_in_a_row)
        group.clear()
        dies = next(runs, False)
        return True

    asyncio.run(
        isolate(
            [Job(seq, "", 0) for seq in range(count)],
            survives=survives,
            engine_is_up=engine_is_up,
            convict=lambda job, _: convicted.append(job.seq),
        )
    )
    assert not convicted or most >= DEATHS_ALONE - 1


@contextmanager
def kept_alive(endpoint: ScriptedEndpoint) -> Iterator[list[int]]:
    """Start the endpoint again whenever it dies; yields a list of one number: how often."""
    stop, deaths = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            if endpoint.has_died():
                deaths[0] += 1
                endpoint.start()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield deaths
    finally:
        stop.set()
        thread.join()


def run_to_the_end(database: Database, url: str, batch_id: UUID, count: int) -> None:
    def is_done() -> bool:
        execute(database, "UPDATE shards SET not_before = NULL WHERE state = 'pending'")
        execute(database, "UPDATE batches SET cursor = 0")
        execute(database, "UPDATE job_tries SET not_before = clock_timestamp()")
        dispatch_all(database)
        fed(database, url, in_flight=64, heartbeat_s=0.2)
        return len(results_of(database, batch_id)) == count

    wait_until(is_done, 60, "every job has its result")


def test_a_job_that_kills_its_engine_ends_alone_as_poison_and_its_neighbours_succeed(
    database: Database, tmp_path: Path
) -> None:
    prompts = [f"q {number} [[latency 0.1]]" for number in range(20)]
    prompts[7] = "kills [[latency 0.05]] [[die]]"
    with ScriptedEndpoint() as endpoint, kept_alive(endpoint) as deaths:
        batch_id, _ = stored(database, tmp_path, prompts, shard_jobs=16)
        run_to_the_end(database, endpoint.url, batch_id, 20)
    results = results_of(database, batch_id)
    assert [result.seq for result in results if result.error_code == "poison_job"] == [7]
    assert all(result.outcome == "succeeded" for result in results if result.seq != 7)
    assert "3 times" in (results[7].error_message or "")
    assert deaths[0] <= 2 + math.ceil(math.log2(20)) + 2
    assert sum(shard.done for shard in shards_of(database, batch_id)) == 20


def test_a_quarantined_shard_waits_until_no_other_runs_on_its_engine_and_keeps_others_off_it(
    database: Database, tmp_path: Path
) -> None:
    with ScriptedEndpoint() as endpoint:
        batch_id, (first, second, third) = stored(database, tmp_path, ["a", "suspect", "c"], shard_jobs=1)
        held = claimed(database, first)
        execute(database, "UPDATE shards SET engine = 'engine' WHERE id = :id", id=first)
        execute(database, "UPDATE shards SET quarantined = true WHERE id = :id", id=second)
        with being_fed(lambda: fed(database, endpoint.url)) as running:
            wait_until(lambda: shards_of(database, batch_id)[1].state == "running", 10, "the suspect is claimed")
            with being_fed(lambda: fed(database, endpoint.url)) as other:
                with pytest.raises(AssertionError):
                    wait_until(lambda: endpoint.calls().count > 0, 1, "a job is sent")
                assert shards_of(database, batch_id)[2].state == "dispatched", "it is kept off the engine"
                execute(database, "UPDATE shards SET state = 'pending', fence = fence + 1 WHERE id = :id", id=first)
                assert running.result(10).jobs == 1
                assert other.result(10).jobs == 1
        assert held.shard_id == first
        assert [shard.state for shard in shards_of(database, batch_id)] == ["pending", "done", "done"]
        assert third
