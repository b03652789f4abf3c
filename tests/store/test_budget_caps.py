"""Caps of keys that change while attempts reserve: what is enforced is what the key says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.keys import make_key
from models.states import Scope
from store.budgets import UNLIMITED, lock_again, lock_budgets, set_key_caps
from store.database import Database
from store.keys import NewKey, create_key
from store.shards import Claim
from tests.support.batches import chats, claimed, dispatch_all, execute, rows, store_batch
from tests.support.waiting import wait_until


def capped(database: Database, folder: Path, day_tokens: int) -> tuple[str, Claim]:
    """A key with a cap, and a claimed shard of its batch."""
    key = make_key()
    with database.transaction() as session:
        create_key(session, NewKey(id=key.id, tenant="local", name="k", digest=key.digest, scopes=(Scope.SUBMIT,)))
        set_key_caps(session, key.id, day_tokens=day_tokens, month_tokens=None)
    batch_id = store_batch(database, folder, chats(2))
    execute(database, "UPDATE batches SET key_id = :key WHERE id = :id", key=key.id, id=batch_id)
    return key.id, claimed(database, dispatch_all(database)[0])


def test_a_cap_that_is_lowered_while_the_day_is_begun_holds(database: Database, tmp_path: Path) -> None:
    key_id, taken = capped(database, tmp_path, 1_000_000)

    def lower() -> None:
        with database.transaction() as session:
            set_key_caps(session, key_id, day_tokens=10, month_tokens=None)

    with ThreadPoolExecutor(1) as pool:
        with database.transaction() as session:
            assert [budget.cap for budget in lock_budgets(session, taken)] == [1_000_000]
            lowering = pool.submit(lower)
            waits = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            wait_until(lambda: rows(database, waits) == [(1,)], 10, "the lowering waits")
        lowering.result(10)
    assert rows(database, "SELECT cap FROM budgets") == [(10,)]


def test_a_cap_that_is_taken_away_ends_no_job(database: Database, tmp_path: Path) -> None:
    key_id, taken = capped(database, tmp_path, 100)
    with database.transaction() as session:
        [held] = lock_budgets(session, taken)
    with database.transaction() as session:
        set_key_caps(session, key_id, day_tokens=None, month_tokens=None)
    with database.transaction() as session:
        assert [budget.cap for budget in lock_again(session, taken, [held.id])] == [UNLIMITED]
        assert lock_budgets(session, taken) == []
