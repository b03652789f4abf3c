"""Token budgets: nothing of any order of steps takes more than a cap, and what does not fit ends cleanly."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from sqlalchemy import text

from models.jobs import Job, JobResult, Usage
from models.states import BudgetPeriod, Outcome
from pipeline.budgets import (
    INPUT_TOKENS,
    MEDIA_TOKENS,
    MESSAGE_TOKENS,
    REQUEST_TOKENS,
    BudgetExceeded,
    BudgetWaits,
    Funding,
    Funds,
    bound_of,
    tokens_of,
)
from pipeline.dispatch import Dispatcher
from runtime.clock import utc_now
from store.budget_tables import TOKENS
from store.budgets import open_batch_budget, set_key_caps
from store.database import Database
from store.shards import Claim, Retry, claim_next, close, give_back, hold_shard, load_jobs, quarantine, write_retries
from tests.support.batches import CHAT, EMBEDDINGS, batch_row, chat, dispatch_all, execute, results_of, store_batch
from tests.support.conversing import Child, store_lines, talk, told_of
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.silent_broker import quiet_leader

JOBS = 60
LEADERS = 48  # the others are equal to one of these
SHARDS = LEADERS // 8
WORKERS = 6
LEASE_S = 0.2
TIMEOUT_S = 60.0
KEY = "sk-test"
ENDED = {"completed", "cancelled", "expired"}
# At the end of every transaction that changed a budget or moved a fence: the budget's row is locked by it, so what it
# reads of that budget is as it will be committed.
WATCH = """
CREATE SEQUENCE checked;
CREATE FUNCTION check_budget() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE b budgets; held bigint; charged bigint; BEGIN
    PERFORM nextval('checked');
    SELECT * INTO b FROM budgets WHERE id = new.id;
    IF b.spent + b.reserved > b.cap THEN RAISE 'budget % is over its cap: % + %', b.id, b.spent, b.reserved; END IF;
    SELECT coalesce(sum(amount), 0) INTO held FROM reservations WHERE budget_id = b.id;
    IF held <> b.reserved THEN RAISE 'budget %: % reserved, % in reservations', b.id, b.reserved, held; END IF;
    SELECT coalesce(sum(r.prompt_tokens + r.completion_tokens), 0) INTO charged FROM results r JOIN batches t
        ON t.id = r.batch_id WHERE t.id = b.batch_id OR t.key_id = b.key_id;
    IF charged <> b.spent THEN RAISE 'budget %: % spent, % in results', b.id, b.spent, charged; END IF;
    RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER checked AFTER INSERT OR UPDATE ON budgets DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION check_budget();
CREATE FUNCTION check_shard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM nextval('checked');
    IF EXISTS (SELECT FROM reservations r JOIN shards s ON s.id = r.shard_id
            WHERE s.id = new.id AND (r.fence <> s.fence OR s.state <> 'running')) THEN
        RAISE 'shard % has a reservation of an attempt that is over', new.id; END IF;
    RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER checked AFTER UPDATE ON shards DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (old.fence <> new.fence) EXECUTE FUNCTION check_shard();
"""


class Unclear(Exception):
    """A COMMIT whose answer was lost."""


class Worker:
    """Runs shards as badly as a worker can, but asks for nothing that it has not reserved."""

    def __init__(self, database: Database, seed: int, stop: threading.Event) -> None:
        self._database = database
        self._random = random.Random(seed)
        self._stop = stop
        self.steps = 0
        self.waits = 0
        self.late = 0

    def run(self) -> None:
        while not self._stop.is_set():
            with self._database.transaction() as session:
                taken = claim_next(session, holder="chaos", lease_s=LEASE_S)
                jobs = load_jobs(session, taken).jobs if taken else []
            self.steps += 1
            if taken is None:
                self._stop.wait(0.01)
            elif not taken.runnable:
                self._end(taken)
            elif self._random.random() > 0.05:  # else it dies at once
                self._attempt(taken, jobs)

    def _attempt(self, taken: Claim, jobs: list[Job]) -> None:
        self._funds = Funds(self._database, taken, most_output=10)
        funding = self._fund(jobs)
        running, self._unfunded = funding.jobs, funding.waiting
        if funding.refused and not self._write(taken, funding.refused):
            return
        while running:
            whim = self._random.random()
            if whim < 0.1:
                return  # dead
            if whim < 0.18:
                time.sleep(LEASE_S * 2)  # a zombie wakes after its lease and writes
            if whim > 0.96:
                break
            count = self._random.randint(1, 5)
            part, running = running[:count], running[count:]
            if not self._some(taken, part, whim):
                return
            if funded := self._funds.go_on():
                running += funded.jobs
                self._unfunded = funded.waiting
                if funded.refused and not self._write(taken, funded.refused):
                    return
        self.waits += bool(self._unfunded)
        self._end(taken)

    def _some(self, taken: Claim, part: list[Job], whim: float) -> bool:
        if 0.2 <= whim < 0.26:
            return self._write(taken, [], retries=part)
        if 0.26 <= whim < 0.3:
            return self._write(taken, [], suspects=part)
        results, waiting = [], []
        for job in part:
            one = self._answer(taken, job)
            if self._random.random() < 0.2:
                try:
                    one = asyncio.run(self._ask_more(taken, job, one))
                except BudgetExceeded as error:
                    one = replace(one, outcome=Outcome.FAILED, response=None, error_code=error.code)
                except BudgetWaits:
                    waiting.append(job)
                    continue
            results.append(one)
        return self._write(taken, results, retries=waiting, is_unclear=whim > 0.7)

    async def _ask_more(self, taken: Claim, job: Job, first: JobResult) -> JobResult:
        """The job's second request, beside what its first took."""
        self.steps += 1
        async with self._funds.covering(job.seq, job.body, taken=tokens_of(first.usage)) as cover:
            second = self._answer(taken, job)
            cover.tokens = tokens_of(second.usage)
        return replace(second, usage=Usage(tokens_of(first.usage), tokens_of(second.usage)))

    def _fund(self, jobs: list[Job]) -> Funding:
        self.steps += 1
        return self._funds.fund(jobs, {})

    def _answer(self, taken: Claim, job: Job) -> JobResult:
        """As dear as it may be, or much cheaper; an engine that charged more would break its word."""
        bound = bound_of(job.body, taken.endpoint, most_output=10)
        tokens = bound if self._random.random() < 0.1 else self._random.randint(0, bound // 2)
        return JobResult(job.seq, Outcome.SUCCEEDED, response="{}", usage=Usage(tokens // 2, tokens - tokens // 2))

    def _write(
        self,
        taken: Claim,
        results: Sequence[JobResult],
        *,
        retries: Sequence[Job] = (),
        suspects: Sequence[Job] = (),
        is_unclear: bool = False,
    ) -> bool:
        """As the feeder does; false if the fence is lost. An unclear one was committed, and is done again."""
        self.steps += 1
        ended = [*(one.seq for one in results), *(job.seq for job in (*retries, *suspects))]
        unfunded = self._unfunded if self._random.random() < 0.7 else []
        tried = [Retry(job.seq, 1, 0, not_before=utc_now(), error="later") for job in retries]
        for unclear in (True, False) if is_unclear else (False,):
            with suppress(Unclear), self._funds.stating(ended, ()):
                with self._database.transaction() as session:
                    held = self._funds.write(session, results, (), engine_id=None, lease_s=LEASE_S)
                    held = held and (not tried or write_retries(session, taken, tried))
                    held = held and hold_shard(session, taken)
                    if held:
                        self._funds.settle(session, {}, unfunded)
                    if held and suspects:
                        held = quarantine(session, taken, [job.seq for job in suspects])
                    if not held:
                        self.late += 1
                        return False
                if unclear:
                    raise Unclear
        return True

    def _end(self, taken: Claim) -> None:
        self.steps += 1
        with self._database.transaction() as session:
            if not close(session, taken):
                give_back(session, taken, wait_s=0.02)


@pytest.fixture
def dispatcher(database: Database, redis_url: str) -> Iterator[Dispatcher]:
    with quiet_leader(database, redis_url, lease_s=LEASE_S) as leading:
        yield leading


def add_key(database: Database, *, day: int | None, month: int | None) -> None:
    execute(
        database,
        "INSERT INTO api_keys (id, tenant, name, digest, scopes) VALUES (:id, 'local', 'mine', '', '{submit}')",
        id=KEY,
    )
    with database.transaction() as session:
        assert set_key_caps(session, KEY, day_tokens=day, month_tokens=month)


def budgeted(
    database: Database,
    folder: Path,
    bodies: list[dict[str, Any]],
    *,
    tokens: int | None,
    key: str | None = None,
    shard_jobs: int = 8,
) -> UUID:
    """A batch with a budget of its own, a key's, or both."""
    batch_id = store_batch(database, folder, bodies, shard_jobs=shard_jobs)
    execute(database, "UPDATE batches SET key_id = :key WHERE id = :id", id=batch_id, key=key)
    if tokens is not None:
        with database.transaction() as session:
            open_batch_budget(session, batch_id, tokens)
    return batch_id


def taken_by(database: Database, batch_id: UUID) -> int:
    with database.transaction() as session:
        return int(
            session.execute(
                text("SELECT sum(prompt_tokens + completion_tokens) FROM results WHERE batch_id = :id"),
                {"id": batch_id},
            ).scalar_one()
        )


def refused(database: Database, batch_id: UUID) -> list[int]:
    return [result.seq for result in results_of(database, batch_id) if result.error_code == "budget_exceeded"]


@pytest.mark.parametrize("seed", [1, 2])
def test_no_interleaving_takes_more_than_any_budget_has_and_every_batch_ends(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, seed: int
) -> None:
    execute(database, WATCH)
    add_key(database, day=14_000, month=60_000)
    bodies = [
        chat(f"question {number % LEADERS}" + "?" * (number % LEADERS * 7), temperature=0, max_tokens=1 + number % 5)
        for number in range(JOBS)
    ]
    batches = [
        budgeted(database, tmp_path, bodies, tokens=9_000, key=KEY),
        budgeted(database, tmp_path, bodies, tokens=None, key=KEY),
        budgeted(database, tmp_path, bodies, tokens=7_000),
        budgeted(database, tmp_path, bodies, tokens=None),
    ]
    stop = threading.Event()
    workers = [Worker(database, seed * 100 + number, stop) for number in range(WORKERS)]
    end = time.monotonic() + TIMEOUT_S
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(worker.run) for worker in workers]
        try:
            while any(batch_row(database, batch)["state"] not in ENDED for batch in batches):
                assert time.monotonic() < end, f"not ended after {TIMEOUT_S:g} s with seed {seed}"
                for one in running:
                    assert not one.done(), one.exception()
                hasten(database)
                dispatch_all(database)
                dispatcher.sweep()
                dispatcher.finish_batches()
        finally:
            stop.set()
        for one in running:
            one.result()
    with database.transaction() as session:
        checked = session.execute(text("SELECT last_value FROM checked")).scalar_one()
        reserved, rows, shards = session.execute(
            text("""SELECT sum(reserved), (SELECT count(*) FROM reservations), (SELECT count(*) FROM shards)
                FROM budgets""")
        ).one()
    split = shards - len(batches) * SHARDS
    steps, waits, late = (sum(getattr(one, name) for one in workers) for name in ("steps", "waits", "late"))
    print(
        f"\nbudgets, seed {seed}: {steps:,} steps of {WORKERS} workers, {checked:,} commits checked, "
        f"{waits:,} attempts that had to wait, {late:,} late writes refused, "
        f"{split:,} shards split off"
    )
    assert min(late, waits, split) > 0
    assert (reserved, rows) == (0, 0)
    for batch, cap in zip(batches, (9_000, 14_000, 7_000, None), strict=True):
        assert [result.seq for result in results_of(database, batch)] == list(range(JOBS))
        assert bool(refused(database, batch)) == (cap is not None)
        assert cap is None or 0 < taken_by(database, batch) <= cap
    spent = {(one.batch_id, one.period): one.spent for one in all_budgets(database)}
    of_key = taken_by(database, batches[0]) + taken_by(database, batches[1])
    assert spent == {
        (None, BudgetPeriod.DAY): of_key,
        (None, BudgetPeriod.MONTH): of_key,
        (batches[0], BudgetPeriod.BATCH): taken_by(database, batches[0]),
        (batches[2], BudgetPeriod.BATCH): taken_by(database, batches[2]),
    }


def hasten(database: Database) -> None:
    """What waits for a budget or a later try is due."""
    execute(
        database,
        "UPDATE budgets b SET waits_until = NULL FROM (SELECT id FROM budgets WHERE waits_until IS NOT NULL "
        "ORDER BY id FOR NO KEY UPDATE) AS held WHERE b.id = held.id",
    )


def all_budgets(database: Database) -> list[Any]:
    with database.transaction() as session:
        return list(session.execute(text("SELECT batch_id, period, spent FROM budgets")).all())


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


@pytest.fixture
def child(database: Database, endpoint: ScriptedEndpoint, redis_url: str) -> Child:
    return Child(database, endpoint.url, redis_url=redis_url)


def test_a_job_that_fits_beside_no_other_waits_without_being_sent_and_runs_in_its_turn(
    child: Child, database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    body = chat("hello")
    batch_id = budgeted(database, tmp_path, [body], tokens=1)
    with database.transaction() as session:
        stored = session.execute(text("SELECT body FROM jobs")).scalar_one()
        bound = bound_of(stored, CHAT, most_output=1)
        open_batch_budget(session, batch_id, bound + 1)
    execute(database, "UPDATE budgets SET reserved = 2")  # by somebody who runs elsewhere
    dispatch_all(database)
    assert (child.feed().jobs, endpoint.calls().count) == (0, 0)
    with database.transaction() as session:
        state, wait = session.execute(text("SELECT state, not_before - clock_timestamp() FROM shards")).one()
    assert state == "pending" and timedelta() < wait < timedelta(seconds=1.1)
    execute(database, "UPDATE shards SET not_before = clock_timestamp()")
    assert dispatch_all(database) == [], "nothing of a full budget is sent out"
    execute(database, "UPDATE budgets SET reserved = 0, waits_until = clock_timestamp()")
    assert child.feed_again().jobs == 1
    assert [result.outcome for result in results_of(database, batch_id)] == ["succeeded"]
    with database.transaction() as session:
        (report,) = TOKENS.of_batch(session, batch_id)
    assert (report.spent, report.reserved, report.cap) == (taken_by(database, batch_id), 0, bound + 1)


def test_one_attempt_spends_a_budget_to_its_end_and_says_which_and_what_to_do(
    child: Child, database: Database, tmp_path: Path
) -> None:
    add_key(database, day=900, month=None)
    bodies = [chat(f"question {number}") for number in range(80)]
    batch_id = budgeted(database, tmp_path, bodies, tokens=None, key=KEY, shard_jobs=80)
    dispatch_all(database)
    assert child.feed().jobs == 80
    assert 0 < len(refused(database, batch_id)) < 80
    message = results_of(database, batch_id)[refused(database, batch_id)[0]].error_message or ""
    assert f"the day budget of key {KEY} has" in message and f"stoker keys limit {KEY} --tokens-per-day N" in message
    assert taken_by(database, batch_id) <= 900
    with database.transaction() as session:
        (report,) = TOKENS.of_tenant(session, "local")
        assert TOKENS.of_tenant(session, "other") == []
        assert set_key_caps(session, KEY, day_tokens=50_000, month_tokens=None)
    assert (report.key_id, report.key_name, report.cap, report.spent) == (
        KEY,
        "mine",
        900,
        taken_by(database, batch_id),
    )
    again = budgeted(database, tmp_path, [chat("later")], tokens=None, key=KEY)
    execute(database, "UPDATE budgets SET began_at = began_at - interval '1 day'")  # a night later
    dispatch_all(database)
    assert child.feed().jobs == 1 and refused(database, again) == []
    with database.transaction() as session:
        (report,) = TOKENS.of_tenant(session, "local")
    assert (report.cap, report.spent) == (50_000, taken_by(database, again)), "a day of its own"


def test_a_conversation_reserves_turn_by_turn_and_ends_with_what_was_said(
    child: Child, database: Database, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    turns = [f"turn {number}" for number in range(200)]
    batch_id = store_lines(database, tmp_path, [talk(*turns)])
    with database.transaction() as session:
        open_batch_budget(session, batch_id, 1_500)
    child.feed()
    (result,) = results_of(database, batch_id)
    assert (result.outcome, result.error_code) == ("failed", "budget_exceeded")
    assert told_of(database, batch_id)["turns"] == endpoint.calls().count > 3
    with database.transaction() as session:
        (report,) = TOKENS.of_batch(session, batch_id)
    assert 100 < report.spent == taken_by(database, batch_id) <= 1_500
    assert report.reserved == 0


@pytest.mark.parametrize("with_redis", [True, False], ids=["with redis", "redis emptied"])
def test_a_conversation_that_goes_on_is_charged_once_for_each_turn(
    child: Child, database: Database, tmp_path: Path, endpoint: ScriptedEndpoint, with_redis: bool
) -> None:
    batch_id = store_lines(database, tmp_path, [talk("one", "two [[fail 1 times]]", "three")])
    with database.transaction() as session:
        open_batch_budget(session, batch_id, 3_000)
    assert child.feed().jobs == 0
    if with_redis:  # as if it had been killed before it wrote its first turn
        execute(database, "UPDATE budgets SET spent = 0")
        execute(database, "DELETE FROM job_steps")
    else:
        with database.transaction() as session:
            (report,) = TOKENS.of_batch(session, batch_id)
        assert (report.spent, report.reserved) == (3, 0), "a turn is charged when it is written"
    assert child.feed_again().jobs == 1
    assert endpoint.calls().count == 4
    with database.transaction() as session:
        (report,) = TOKENS.of_batch(session, batch_id)
    assert (report.spent, report.reserved) == (taken_by(database, batch_id), 0)


BOUNDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "a chat": (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 7}, MESSAGE_TOKENS + 7),
    "the larger limit, for each choice": (
        CHAT,
        {"messages": [], "n": 3, "max_tokens": 9, "max_completion_tokens": 5},
        27,
    ),
    "no limit": (CHAT, {"messages": []}, 1_000),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text"}]}], "max_tokens": 1},
        MESSAGE_TOKENS + MEDIA_TOKENS + 1,
    ),
    "prompts": ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "best_of": 2}, 16),
    "token ids": ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4}, 4),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_most_that_a_request_takes_is_known_from_its_bytes(name: str) -> None:
    path, fields, more = BOUNDS[name]
    body = msgspec.json.encode({"model": "m", **fields})
    assert bound_of(body, path, most_output=1_000) == len(body) + REQUEST_TOKENS + more
    texts = msgspec.json.encode({"input": ["é", "b"]})
    assert bound_of(texts.decode(), EMBEDDINGS, most_output=1) == len(texts) + 2 * INPUT_TOKENS
