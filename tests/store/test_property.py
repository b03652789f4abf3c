"""The shard protocol under everything at once: dead workers, late ones, cancel, expiry, repeated writes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from pipeline.dispatch import Dispatcher
from store.batches import request_cancel
from store.database import Database
from store.shards import Claim, claim_next, close, give_back, load_jobs, write_results
from tests.support.batches import answers, batch_row, chat, dispatch_all, execute, results_of, shards_of, store_batch
from tests.support.silent_broker import quiet_leader

JOBS = 150
LEADERS = 110  # the others are equal to one of these
WORKERS = 6
LEASE_S = 0.3
TIMEOUT_S = 60.0
ENDED = {"completed", "cancelled", "expired"}


class Worker:
    """Runs shards as badly as a worker can, until it is told to stop."""

    def __init__(self, database: Database, seed: int, stop: threading.Event) -> None:
        self._database = database
        self._random = random.Random(seed)
        self._stop = stop
        self.late_writes = 0

    def run(self) -> None:
        while not self._stop.is_set():
            with self._database.transaction() as session:
                taken = claim_next(session, holder="chaos", lease_s=LEASE_S)
                seqs = [job.seq for job in load_jobs(session, taken).jobs] if taken else []
            if taken is None:
                self._stop.wait(0.01)
            elif not taken.runnable or self._random.random() < 0.1:
                self._give_back(taken)
            else:
                self._attempt(taken, seqs)

    def _attempt(self, taken: Claim, seqs: list[int]) -> None:
        self._random.shuffle(seqs)
        while seqs:
            whim = self._random.random()
            if whim < 0.05:
                return None  # dead
            if whim < 0.12:
                time.sleep(LEASE_S * 2)  # a zombie wakes after its lease and writes
            count = self._random.randint(1, 4)
            part, seqs = seqs[:count], seqs[count:]
            for _ in range(2 if whim > 0.9 else 1):
                if not self._write(taken, part):
                    self.late_writes += 1
                    return None
            if whim > 0.95:
                return self._give_back(taken)
        with self._database.transaction() as session:
            close(session, taken)
        return None

    def _write(self, taken: Claim, seqs: list[int]) -> bool:
        with self._database.transaction() as session:
            return write_results(session, taken, answers(seqs), engine_id=None, lease_s=LEASE_S) is not None

    def _give_back(self, taken: Claim) -> None:
        with self._database.transaction() as session:
            give_back(session, taken, wait_s=0)


@pytest.fixture
def dispatcher(database: Database, redis_url: str) -> Iterator[Dispatcher]:
    with quiet_leader(database, redis_url, lease_s=LEASE_S) as leading:
        yield leading


@pytest.mark.parametrize("seed", [1, 2])
def test_every_job_ends_exactly_once_whatever_its_workers_do(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, seed: int
) -> None:
    bodies = [chat(f"question {number % LEADERS}", temperature=0) for number in range(JOBS)]
    plain, cancelled, expired = batches = [store_batch(database, tmp_path, bodies, shard_jobs=9) for _ in range(3)]
    stop = threading.Event()
    workers = [Worker(database, seed * 100 + number, stop) for number in range(WORKERS)]
    end = time.monotonic() + TIMEOUT_S
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(worker.run) for worker in workers]
        try:
            while any(batch_row(database, batch)["state"] not in ENDED for batch in batches):
                assert time.monotonic() < end, f"not ended after {TIMEOUT_S:g} s with seed {seed}"
                dispatch_all(database)
                dispatcher.sweep()
                dispatcher.finish_batches()
                if len(results_of(database, cancelled)) > JOBS // 3:
                    with database.transaction() as session:
                        request_cancel(session, cancelled)
                if len(results_of(database, expired)) > JOBS // 3:
                    execute(database, "UPDATE batches SET expires_at = in_progress_at WHERE id = :id", id=expired)
        finally:
            stop.set()
        for one in running:
            one.result()
    assert batch_row(database, plain)["state"] == "completed"
    assert sum(worker.late_writes for worker in workers) > 0, "the zombies were put to the test"
    with database.transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM results")) == 3 * JOBS
    for batch_id in batches:
        shards, results = shards_of(database, batch_id), results_of(database, batch_id)
        assert [result.seq for result in results] == list(range(JOBS))
        assert sorted(seq for shard in shards for seq in shard.seqs) == list(range(LEADERS))
        for result in results[LEADERS:]:
            leader = results[result.seq % LEADERS]
            assert (result.outcome, result.response, result.error_code) == (
                leader.outcome,
                leader.response,
                leader.error_code,
            )
        assert (batch_row(database, batch_id)["shards_left"], {shard.state for shard in shards}) == (0, {"done"})
        failed = sum(result.outcome == "failed" for result in results)
        assert (sum(shard.done for shard in shards), sum(shard.failed for shard in shards)) == (LEADERS, failed)
        answered = sum(result.outcome != "failed" for result in results[:LEADERS])
        assert sum(shard.completion_tokens for shard in shards) == 2 * answered
