"""What attempts pay, in any order of their steps: never above a cap, and never other than what was billed."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import ClassVar
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from models.endpoints import Prices
from pipeline.budgets import BudgetExceeded
from pipeline.purse import KeyPurse, Purse
from runtime.errors import LostFence, ServiceUnreachable
from store.budget_tables import MONEY
from store.database import Database, Session
from store.money import open_batch_money, set_key_money
from store.shards import Claim, claim_next, give_back, recover_dead_leases
from tests.store.test_money import add_key, amounts
from tests.support.batches import CHAT, batch_row, chats, dispatch_all, execute, rows, store_batch
from tests.support.waiting import wait_until

PRICES = Prices(output=Decimal("0.001"))  # one nano for each output token
WATCH = """
CREATE FUNCTION check_money() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE b money_budgets; held bigint; BEGIN
    SELECT * INTO b FROM money_budgets WHERE id = new.id;
    IF b.spent + b.reserved > b.cap THEN RAISE 'budget % is over its cap: % + %', b.id, b.spent, b.reserved; END IF;
    SELECT coalesce(sum(amount), 0) INTO held FROM money_reservations WHERE budget_id = b.id;
    IF held <> b.reserved THEN RAISE 'budget %: % reserved, % in reservations', b.id, b.reserved, held; END IF;
    RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER checked AFTER INSERT OR UPDATE ON money_budgets DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION check_money();
"""


class Forgetful(Database):
    """Loses the answer of a COMMIT when it is told to."""

    loses = False

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with super().transaction() as session:
            yield session
        if self.loses:
            self.loses = False
            raise ServiceUnreachable("the answer of a COMMIT was lost")


@pytest.fixture
def forgetful(postgres_url: str) -> Iterator[Forgetful]:
    opened = Forgetful(postgres_url, pool_size=20)
    yield opened
    opened.close()


def body(nanos: int) -> bytes:
    """Of a request that costs so much at the most."""
    return json.dumps({"model": "m", "max_tokens": nanos, "messages": []}).encode()


async def asked(purse: Purse, nanos: int, *, spills: bool = False) -> int:
    return await purse.pay(PRICES, CHAT, body(nanos), spills=spills)


def settle(database: Database, purse: Purse) -> None:
    with purse.stating(), database.transaction() as session:
        purse.settle(session)


def paid_batch(database: Database, folder: Path, nanos: int | None, *, shards: int = 1, key: str | None = None) -> UUID:
    batch_id = store_batch(database, folder, chats(shards), shard_jobs=1)
    execute(database, "UPDATE batches SET key_id = :key WHERE id = :id", key=key, id=batch_id)
    if nanos is not None:
        with database.transaction() as session:
            open_batch_money(session, batch_id, nanos)
    dispatch_all(database)
    return batch_id


def attempt(database: Database) -> tuple[Claim, Purse]:
    with database.transaction() as session:
        taken = claim_next(session, holder="test", lease_s=600.0)
    assert taken is not None
    return taken, Purse(database, taken, most_output=64)


def test_a_request_reserves_the_most_that_it_may_cost_and_spends_what_it_did(
    database: Database, tmp_path: Path
) -> None:
    paid_batch(database, tmp_path, 10**9)
    _, purse = attempt(database)
    prices = Prices(input=Decimal(2), output=Decimal(8))
    asking = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()

    async def one() -> int:
        return await purse.pay(prices, CHAT, asking, spills=False)

    nanos = asyncio.run(one())
    assert nanos == prices.most_nanos(prompt_tokens=len(asking) + 512 + 8, output_tokens=64)
    assert amounts(database) == [(0, nanos)]
    purse.ended(nanos, spent=1_234)
    settle(database, purse)
    assert amounts(database) == [(1_234, 0)]
    free = asyncio.run(purse.pay(Prices(), CHAT, body(1), spills=False))
    assert free == 1, "nothing is asked without a reservation"


def test_a_key_pays_a_single_request_before_it_is_asked_and_gets_back_what_it_did_not_cost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id = add_key(database, day=10**6, month=None)

    async def story() -> None:
        purse = KeyPurse(database, key_id, most_output=64)
        assert await purse.pay(PRICES, CHAT, body(700), spills=True) == 0, "own endpoints first"
        assert await purse.pay(PRICES, CHAT, body(700_000), spills=False) == 700_000
        assert amounts(database) == [(0, 700_000)]
        other = KeyPurse(database, key_id, most_output=64)
        assert await other.pay(PRICES, CHAT, body(700_000), spills=False) == 0, "it waits for what the first holds"
        purse.ended(700_000, spent=200)
        monkeypatch.setattr("pipeline.purse.OWN_FIRST_S", 0.0)
        assert await purse.pay(PRICES, CHAT, body(300), spills=True) == 300, "the next endpoint, of the first's rest"
        assert amounts(database) == [(200, 300)]
        await purse.settle()  # it was never sent
        await purse.settle()
        assert amounts(database) == [(200, 0)]
        with pytest.raises(BudgetExceeded, match=rf"0.0009998 left of 0.001; .* limit {key_id}"):
            await purse.pay(PRICES, CHAT, body(10**6), spills=False)
        paying = asyncio.ensure_future(purse.pay(PRICES, CHAT, body(9), spills=False))
        await asyncio.sleep(0)
        paying.cancel()  # its client has gone; the thread goes on
        await asyncio.wait([paying])
        await purse.settle()
        assert paying.cancelled() and amounts(database) == [(200, 0)]

    asyncio.run(story())


def test_what_fits_beside_no_other_waits_and_what_never_fits_ends_with_the_remedy(
    database: Database, tmp_path: Path
) -> None:
    key_id = add_key(database, day=80, month=None)
    batch_id = paid_batch(database, tmp_path, 100, shards=2, key=key_id)
    (_, one), (_, other) = attempt(database), attempt(database)

    async def work() -> None:
        assert await asked(one, 60) == 60
        assert await asked(other, 30) == 0, "not now: the other may cost less"
        with pytest.raises(BudgetExceeded, match=f"day budget of key {key_id} has 0.00000008 left.*--money-per-day N"):
            await asked(other, 81)
        assert await asked(other, 81, spills=True) == 0, "own endpoints can do it"
        one.ended(60, spent=55)
        await asyncio.to_thread(settle, database, one)
        assert await asked(other, 25) == 25
        with pytest.raises(BudgetExceeded, match=r"has 0\.000000025 left"):
            await asked(one, 26)
        other.ended(25, spent=0)
        await asyncio.to_thread(settle, database, other)
        with database.transaction() as session:
            set_key_money(session, key_id, day_money=1_000, month_money=None)
        with pytest.raises(BudgetExceeded, match=r"the batch's budget of money has 0\.000000045 left"):
            await asked(other, 46)

    asyncio.run(work())
    with database.transaction() as session:
        assert {(one.spent, one.reserved) for one in MONEY.of_batch(session, batch_id)} == {(55, 0)}


def test_where_no_budget_holds_any_more_a_request_ends_and_does_not_wait(database: Database, tmp_path: Path) -> None:
    key_id = add_key(database, day=80, month=None)
    paid_batch(database, tmp_path, None, key=key_id)
    _, purse = attempt(database)
    with database.transaction() as session:
        set_key_money(session, key_id, day_money=None, month_money=None)
    with pytest.raises(BudgetExceeded, match="--budget-money"):
        asyncio.run(asked(purse, 1))
    assert asyncio.run(asked(purse, 1, spills=True)) == 0


def test_a_spilled_request_takes_one_of_the_places(database: Database, tmp_path: Path) -> None:
    batch_id = paid_batch(database, tmp_path, 100)
    execute(database, "UPDATE batches SET spill = 2 WHERE id = :id", id=batch_id)
    _, purse = attempt(database)

    async def work() -> list[int]:
        wishes = [(90, False), (20, True), (5, True), (5, True), (5, True), (5, False)]
        return [await asked(purse, nanos, spills=spills) for nanos, spills in wishes]

    assert asyncio.run(work()) == [90, 0, 5, 5, 0, 0], "one without room takes no place"
    assert batch_row(database, batch_id)["spill"] == 0
    assert rows(database, "SELECT requests, amount FROM money_reservations") == [(3, 100)]


def test_a_lost_fence_pays_nothing_and_a_lost_answer_of_a_commit_is_made_good(
    forgetful: Forgetful, tmp_path: Path
) -> None:
    paid_batch(forgetful, tmp_path, 100)
    taken, purse = attempt(forgetful)
    forgetful.loses = True
    assert asyncio.run(asked(purse, 70)) == 0 and amounts(forgetful) == [(0, 70)], "committed, but nobody knows"
    assert asyncio.run(asked(purse, 60)) == 60 and amounts(forgetful) == [(0, 60)]
    purse.ended(60, spent=50)
    forgetful.loses = True
    with pytest.raises(ServiceUnreachable):
        settle(forgetful, purse)
    settle(forgetful, purse)
    assert amounts(forgetful) == [(50, 0)]
    with forgetful.transaction() as session:
        give_back(session, taken, wait_s=0.0)
    assert asyncio.run(asked(purse, 1)) == 0
    with pytest.raises(LostFence):
        settle(forgetful, purse)


def test_what_a_cancelled_request_has_reserved_is_free_again(database: Database, tmp_path: Path) -> None:
    paid_batch(database, tmp_path, 100)
    _, purse = attempt(database)

    async def work(holding: psycopg.Connection) -> None:
        paying = asyncio.create_task(asked(purse, 70))
        await asyncio.to_thread(wait_until, lambda: is_waiting(database), 10, "it waits for the budget's row")
        paying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await paying
        holding.rollback()
        await asyncio.to_thread(wait_until, lambda: amounts(database) == [(0, 70)], 10, "the thread has reserved")
        assert await asked(purse, 100) == 100

    with database.connection() as holding:
        holding.execute("SELECT 1 FROM money_budgets FOR UPDATE")
        asyncio.run(work(holding))


def test_threads_that_pay_at_once_never_reserve_more_than_there_is(database: Database, tmp_path: Path) -> None:
    execute(database, WATCH)
    key_id = add_key(database, day=900, month=None)
    batches = [paid_batch(database, tmp_path, 600, shards=3, key=key_id) for _ in range(2)]
    billed = threading.Lock(), [0]

    def work(seed: int) -> None:
        whim = random.Random(seed)
        _, purse = attempt(database)

        async def job() -> None:
            for _ in range(6):
                try:
                    nanos = await asked(purse, whim.randint(1, 90))
                except BudgetExceeded:
                    continue
                if whim.random() < 0.6:  # beside what the others pay
                    await asyncio.to_thread(settle, database, purse)
                if nanos:
                    spent = whim.choice([0, nanos, whim.randint(0, nanos)])
                    with billed[0]:
                        billed[1][0] += spent
                    purse.ended(nanos, spent=spent)

        async def jobs() -> None:
            await asyncio.gather(*(job() for _ in range(5)))
            await asyncio.to_thread(settle, database, purse)

        asyncio.run(jobs())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    with database.transaction() as session:
        reports = [report for batch_id in batches for report in MONEY.of_batch(session, batch_id)]
    day = next(report for report in reports if report.batch_id is None)
    assert day.spent == billed[1][0] == sum(report.spent for report in reports if report.batch_id is not None) > 600
    assert all(report.reserved == 0 for report in reports)


@dataclass(slots=True)
class Stated:
    """An attempt as it should be: what it has open and spent, and what of that Postgres was told."""

    taken: Claim
    purse: Purse
    opened: list[int] = field(default_factory=list)
    spent: int = 0
    told_reserved: int = 0
    told_spent: int = 0

    def tell(self, *, more: int = 0) -> None:
        self.told_reserved, self.told_spent = sum(self.opened) + more, self.spent


class Money(RuleBasedStateMachine):
    """Two batches of one key, an attempt each; a budget of each batch and one of the key's day."""

    database: ClassVar[Forgetful]
    folder: ClassVar[Path]
    runner: ClassVar[asyncio.Runner]
    CAP, DAY = 60, 90

    @initialize()
    def begin(self) -> None:
        for table in ("money_reservations", "money_budgets", "shards", "jobs", "batches", "api_keys"):
            execute(self.database, f"DELETE FROM {table}")
        self.key = add_key(self.database, day=self.DAY, month=None)
        for _ in range(2):
            paid_batch(self.database, self.folder, self.CAP, key=self.key)
        self.over: dict[UUID, int] = {}  # what attempts that are over have spent
        self.attempts = [Stated(*attempt(self.database)) for _ in range(2)]
        self.late: Stated | None = None

    def charged(self, batch_id: UUID | None) -> tuple[int, int]:
        """(spent, reserved) of a batch, or of the day."""
        of = [one for one in self.attempts if batch_id in (None, one.taken.batch_id)]
        over = sum(self.over.values()) if batch_id is None else self.over.get(batch_id, 0)
        return over + sum(one.told_spent for one in of), sum(one.told_reserved for one in of)

    @rule(which=st.integers(0, 1), nanos=st.integers(1, 50), is_lost=st.booleans())
    def pay(self, which: int, nanos: int, is_lost: bool) -> None:
        one = self.attempts[which]
        rooms = []
        for batch_id, cap in ((one.taken.batch_id, self.CAP), (None, self.DAY)):
            spent, reserved = self.charged(batch_id)
            left = cap - (spent - one.told_spent + one.spent)
            rooms.append((left, left - (reserved - one.told_reserved + sum(one.opened))))
        if nanos > min(left for left, _ in rooms):
            with pytest.raises(BudgetExceeded):
                self.runner.run(asked(one.purse, nanos))
            return
        fits = nanos <= min(room for _, room in rooms)
        self.database.loses = is_lost and fits
        assert self.runner.run(asked(one.purse, nanos)) == (nanos if fits and not is_lost else 0)
        if fits:
            one.tell(more=nanos)
            one.opened += [] if is_lost else [nanos]

    @precondition(lambda self: any(one.opened for one in self.attempts))
    @rule(pick=st.integers(0, 99), share=st.sampled_from([0.0, 0.3, 1.0]))
    def end(self, pick: int, share: float) -> None:
        one = self.attempts[0] if self.attempts[0].opened else self.attempts[1]
        nanos = one.opened.pop(pick % len(one.opened))
        one.spent += int(nanos * share)
        one.purse.ended(nanos, spent=int(nanos * share))

    @rule(which=st.integers(0, 1), is_lost=st.booleans())
    def settle(self, which: int, is_lost: bool) -> None:
        one = self.attempts[which]
        has_reserved = bool(one.purse._budget_ids)
        self.database.loses = is_lost
        try:
            settle(self.database, one.purse)
        except ServiceUnreachable:
            assert is_lost
        if has_reserved:
            one.tell()

    @rule(which=st.integers(0, 1))
    def die(self, which: int) -> None:
        one = self.attempts[which]
        execute(self.database, "UPDATE shards SET lease_until = now() WHERE id = :id", id=one.taken.shard_id)
        with self.database.transaction() as session:
            assert [found.shard_id for found in recover_dead_leases(session, lease_s=0.0)] == [one.taken.shard_id]
        self.leave(which, charged=one.told_spent + one.told_reserved)

    @rule(which=st.integers(0, 1))
    def give_back(self, which: int) -> None:
        one = self.attempts[which]
        while one.opened:
            one.purse.ended(one.opened.pop(), spent=0)
        with one.purse.stating(), self.database.transaction() as session:
            one.purse.settle(session)
            assert give_back(session, one.taken, wait_s=0.0)
        self.leave(which, charged=one.spent)

    def leave(self, which: int, *, charged: int) -> None:
        one = self.attempts[which]
        self.over[one.taken.batch_id] = self.over.get(one.taken.batch_id, 0) + charged
        execute(self.database, "UPDATE shards SET not_before = now(), crashes = 0 WHERE state = 'pending'")
        dispatch_all(self.database)
        self.late, self.attempts[which] = one, Stated(*attempt(self.database))

    @precondition(lambda self: self.late is not None)
    @rule()
    def write_late(self) -> None:
        assert self.late is not None
        assert self.runner.run(asked(self.late.purse, 1)) == 0
        if self.late.purse._budget_ids:
            with pytest.raises(LostFence):
                settle(self.database, self.late.purse)

    @invariant()
    def all_is_as_it_was_billed(self) -> None:
        found = rows(self.database, "SELECT batch_id, cap, spent, reserved FROM money_budgets")
        for batch_id, cap, spent, reserved in found:
            assert spent + reserved <= cap
            assert (spent, reserved) == self.charged(batch_id), batch_id

    def teardown(self) -> None:
        if hasattr(self, "attempts"):
            for which in range(2):
                self.give_back(which)
            assert all(reserved == 0 for _, reserved in amounts(self.database))


def test_no_order_of_steps_spends_other_than_what_was_billed(forgetful: Forgetful, tmp_path: Path) -> None:
    Money.database, Money.folder = forgetful, tmp_path
    with asyncio.Runner() as Money.runner:
        run_state_machine_as_test(
            Money,
            settings=settings(
                max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )


def is_waiting(database: Database) -> bool:
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return rows(database, waits) == [(1,)]
