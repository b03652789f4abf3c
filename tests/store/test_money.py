"""The rows of money: what is stated as a whole, what becomes of it with an attempt's end, and caps of keys."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

from models.keys import make_key
from models.states import BudgetPeriod, Scope
from store.budget_tables import MONEY
from store.database import Database
from store.keys import NewKey, create_key
from store.money import (
    lock_money,
    lock_money_again,
    open_batch_money,
    set_key_money,
    state_money,
    take_spill,
)
from store.shards import Claim, claim_next, close, give_back, recover_dead_leases, write_results
from tests.support.batches import answers, chats, claimed, dispatch_all, execute, rows, store_batch


def paid_batch(database: Database, folder: Path, nanos: int, *, shards: int = 1) -> UUID:
    """A batch with a budget of its own, dispatched."""
    batch_id = store_batch(database, folder, chats(2 * shards), shard_jobs=2)
    with database.transaction() as session:
        open_batch_money(session, batch_id, nanos)
    dispatch_all(database)
    return batch_id


def next_claim(database: Database) -> Claim:
    with database.transaction() as session:
        taken = claim_next(session, holder="test", lease_s=30.0)
    assert taken is not None and taken.paid
    return taken


def state(database: Database, taken: Claim, *, reserved: int, spent: int) -> None:
    with database.transaction() as session:
        ids = [budget.id for budget in lock_money(session, taken)]
        state_money(session, taken, ids, reserved=reserved, spent=spent, requests=1)


def amounts(database: Database) -> list[tuple[int, int]]:
    """(spent, reserved) of all budgets."""
    return [(spent, held) for spent, held in rows(database, "SELECT spent, reserved FROM money_budgets ORDER BY id")]


def add_key(database: Database, *, day: int | None, month: int | None) -> str:
    key = make_key()
    with database.transaction() as session:
        create_key(session, NewKey(id=key.id, tenant="local", name="k", digest=key.digest, scopes=(Scope.SUBMIT,)))
        assert set_key_money(session, key.id, day_money=day, month_money=month)
    return key.id


def test_what_is_stated_twice_counts_once_and_attempts_add_up(database: Database, tmp_path: Path) -> None:
    batch_id = paid_batch(database, tmp_path, 1_000, shards=2)
    one, other = next_claim(database), next_claim(database)
    for _ in range(2):
        state(database, one, reserved=300, spent=100)
    state(database, other, reserved=50, spent=5)
    with database.transaction() as session:
        (held,) = lock_money(session, one)
        (report,) = MONEY.of_batch(session, batch_id)
    assert (held.spent, held.reserved, held.own_spent, held.own_reserved) == (105, 350, 100, 300)
    assert (report.cap, report.spent, report.reserved, report.period) == (1_000, 105, 350, BudgetPeriod.BATCH)
    state(database, one, reserved=0, spent=400)
    assert amounts(database) == [(405, 50)]


def test_a_dead_attempt_has_spent_what_it_had_reserved_and_an_orderly_end_frees_it(
    database: Database, tmp_path: Path
) -> None:
    paid_batch(database, tmp_path, 1_000, shards=3)
    dead, returned, closed = (next_claim(database) for _ in range(3))
    for taken in (dead, returned, closed):
        state(database, taken, reserved=100, spent=10)
    with database.transaction() as session:
        assert give_back(session, returned, wait_s=0.0)
    assert amounts(database) == [(30, 200)]
    with database.transaction() as session:
        assert write_results(session, closed, answers(closed.seqs), engine_id=None, lease_s=30.0) == 2
        assert close(session, closed)
    assert amounts(database) == [(30, 100)]
    execute(database, "UPDATE shards SET lease_until = clock_timestamp() WHERE id = :id", id=dead.shard_id)
    for _ in range(2):
        with database.transaction() as session:
            recover_dead_leases(session, lease_s=0.0)
    assert amounts(database) == [(130, 0)], "billed, whoever hears the answer"
    assert rows(database, "SELECT count(*) FROM money_reservations") == [(0,)]


def test_a_key_has_a_cap_a_day_and_a_month_which_hold_at_once(database: Database, tmp_path: Path) -> None:
    key_id = add_key(database, day=500, month=2_000)
    batch_id = store_batch(database, tmp_path, chats(2))
    execute(database, "UPDATE batches SET key_id = :key WHERE id = :id", key=key_id, id=batch_id)
    taken = claimed(database, dispatch_all(database)[0])
    assert taken.paid
    state(database, taken, reserved=40, spent=60)
    with database.transaction() as session:
        assert {(one.period, one.cap, one.spent, one.reserved) for one in MONEY.of_tenant(session, "local")} == {
            (BudgetPeriod.DAY, 500, 60, 40),
            (BudgetPeriod.MONTH, 2_000, 60, 40),
        }
        assert MONEY.of_tenant(session, "other") == []
        assert set_key_money(session, key_id, day_money=70, month_money=None)
        assert not set_key_money(session, "sk-nobody", day_money=1, month_money=None)
    with database.transaction() as session:
        (held,) = lock_money(session, taken)
        assert (held.period, held.cap) == (BudgetPeriod.DAY, 70)
        both = [number for (number,) in rows(database, "SELECT id FROM money_budgets")]
        again = lock_money_again(session, taken, both)
    assert [(one.period, one.own_spent) for one in again] == [(BudgetPeriod.DAY, 60), (BudgetPeriod.MONTH, 60)]
    execute(database, "UPDATE money_budgets SET began_at = began_at - interval '1 day' WHERE period = 'day'")
    with database.transaction() as session:
        (fresh,) = lock_money(session, taken)
    assert (fresh.cap, fresh.spent, fresh.own_reserved) == (70, 0, 0), "a day of its own"


def test_only_a_batch_with_a_budget_or_a_capped_key_is_paid_for(database: Database, tmp_path: Path) -> None:
    batch_id = store_batch(database, tmp_path, chats(2))
    key_id = add_key(database, day=None, month=None)
    execute(database, "UPDATE batches SET key_id = :key WHERE id = :id", key=key_id, id=batch_id)
    taken = claimed(database, dispatch_all(database)[0])
    assert not taken.paid
    with database.transaction() as session:
        assert lock_money(session, taken) == [] and MONEY.of_batch(session, batch_id) == []


def test_as_many_jobs_spill_as_there_are_places_for(database: Database, tmp_path: Path) -> None:
    batch_id = paid_batch(database, tmp_path, 1)
    execute(database, "UPDATE batches SET spill = 2 WHERE id = :id", id=batch_id)
    taken = []
    for _ in range(3):
        with database.transaction() as session:
            taken.append(take_spill(session, batch_id))
    assert taken == [True, True, False]
    with database.transaction() as session:
        assert not take_spill(session, uuid4())
