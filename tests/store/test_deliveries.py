"""Deliveries' rows: one a batch, written with its end, taken by one, recorded under who took it; and their secrets."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from models.states import DeliveryState
from store.batches import finish
from store.database import Database
from store.deliveries import (
    DeliveryRow,
    TakenDelivery,
    Tried,
    announce_end,
    deliveries_of,
    record,
    rotate_secret,
    signing_secrets,
    take_due,
    webhook_secret,
)
from store.shards import close, write_results
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, execute, store_batch
from tests.support.webhook_receiver import ended_batch, make_due, stored_request

URL = "https://receiver.test/hook"
REQUEST = json.dumps({"stoker": {"webhook": {"url": URL}}})
LEASE = timedelta(minutes=1)


def taken(database: Database, *, limit: int = 100, per_tenant: int = 100, without: tuple[str, ...] = ()) -> list[UUID]:
    with database.transaction() as session:
        return [
            one.batch_id
            for one in take_due(session, limit=limit, lease=LEASE, per_tenant=per_tenant, without=list(without))
        ]


def take_one(database: Database) -> TakenDelivery:
    with database.transaction() as session:
        (one,) = take_due(session, limit=1, lease=LEASE, per_tenant=1)
    return one


def recorded(database: Database, delivery: TakenDelivery, tried: Tried) -> DeliveryRow:
    with database.transaction() as session:
        record(session, delivery, tried)
        (row,) = deliveries_of(session, tenant=delivery.tenant, batch_id=delivery.batch_id)
    return row


def announced(database: Database, batch_id: UUID, *, tenant: str = "local") -> list[tuple[str, str]]:
    with database.transaction() as session:
        announce_end(session, batch_id)
        announce_end(session, batch_id)
        return [(row.event, row.url) for row in deliveries_of(session, tenant=tenant, batch_id=batch_id)]


@pytest.mark.parametrize("url", [URL, None])
def test_the_end_of_a_batch_and_its_delivery_come_together(database: Database, tmp_path: Path, url: str | None) -> None:
    batch_id = store_batch(database, tmp_path, chats(1))
    if url is not None:
        execute(database, "UPDATE batches SET request = CAST(:request AS jsonb)", request=REQUEST)
    held = claimed(database, dispatch_all(database)[0])
    with database.transaction() as session:
        assert write_results(session, held, answers(held.seqs), engine_id=None, lease_s=LEASE_S)
        assert close(session, held)
    with database.transaction() as session:
        finish(session, batch_id)
        assert len(deliveries_of(session, tenant="local")) == (url is not None)
    assert announced(database, batch_id) == ([] if url is None else [("batch.completed", URL)])


@pytest.mark.parametrize("state", ["completed", "failed", "expired", "cancelled"])
def test_each_end_has_its_event_and_is_told_once(database: Database, state: str) -> None:
    batch_id = stored_request(database, URL, state=state, tenant="acme")
    assert announced(database, batch_id, tenant="acme") == [(f"batch.{state}", URL)]


@pytest.mark.parametrize("state", ["validating", "in_progress", "cancelling", "finalizing"])
def test_a_batch_that_has_not_ended_tells_nothing(database: Database, state: str) -> None:
    assert announced(database, stored_request(database, URL, state=state)) == []


def test_a_taken_delivery_is_due_again_only_after_its_lease(database: Database) -> None:
    batch_id = ended_batch(database, URL)
    assert [taken(database), taken(database)] == [[batch_id], []]
    make_due(database)
    assert take_one(database).tries == 2


def test_two_who_take_at_once_share_what_is_due(database: Database) -> None:
    batches = {ended_batch(database, URL) for _ in range(20)}
    with ThreadPoolExecutor(4) as pool:
        rounds = list(pool.map(lambda _: taken(database, limit=5), range(8)))
    found = [batch_id for some in [*rounds, taken(database)] for batch_id in some]
    assert (len(found), set(found)) == (20, batches)


def test_what_one_holds_in_an_open_transaction_another_leaves(database: Database) -> None:
    ended_batch(database, URL)
    with database.transaction() as session:
        assert len(take_due(session, limit=1, lease=LEASE, per_tenant=1)) == 1
        assert taken(database) == []


def test_tenants_take_turns_and_one_with_enough_under_way_waits(database: Database) -> None:
    many = [ended_batch(database, URL, tenant="many") for _ in range(4)]
    one = ended_batch(database, URL, tenant="one")
    assert set(taken(database, limit=2)) == {many[0], one}
    assert taken(database, without=("many",)) == []
    assert taken(database, per_tenant=2) == many[1:3]


def test_what_became_of_a_try_is_kept(database: Database) -> None:
    ended_batch(database, URL)
    again = Tried(DeliveryState.PENDING, 500, "answered 500", timedelta(hours=1))
    row = recorded(database, take_one(database), again)
    assert (row.state, row.tries, row.status_code, row.error, row.ended_at) == ("pending", 1, 500, "answered 500", None)
    assert timedelta(minutes=59) < row.next_at - row.created_at < timedelta(minutes=61)
    make_due(database)
    row = recorded(database, take_one(database), Tried(DeliveryState.DELIVERED, 204))
    assert (row.state, row.tries, row.status_code, row.error) == ("delivered", 2, 204, None)
    assert row.ended_at is not None
    make_due(database)
    assert taken(database) == []


def test_a_sender_that_was_overtaken_can_only_say_that_it_arrived(database: Database) -> None:
    ended_batch(database, URL)
    slow = take_one(database)
    make_due(database)
    take_one(database)
    assert recorded(database, slow, Tried(DeliveryState.FAILED, 410, "gone")).state is DeliveryState.PENDING
    assert recorded(database, slow, Tried(DeliveryState.DELIVERED, 200)).state is DeliveryState.DELIVERED


def test_a_tenant_sees_its_own_deliveries_newest_first(database: Database) -> None:
    older, newer = ended_batch(database, URL), ended_batch(database, URL)
    other = ended_batch(database, URL, tenant="other")
    with database.transaction() as session:
        assert [row.batch_id for row in deliveries_of(session, tenant="local")] == [newer, older]
        assert [row.batch_id for row in deliveries_of(session, tenant="local", limit=1)] == [newer]
        assert deliveries_of(session, tenant="local", batch_id=other) == []


def test_a_tenants_secret_is_made_once_and_the_one_before_a_rotation_holds_a_day(database: Database) -> None:
    def used(_: int) -> bytes:
        with database.transaction() as session:
            return webhook_secret(session, "local")

    with ThreadPoolExecutor(4) as pool:
        (first,) = set(pool.map(used, range(8)))
    assert len(first) == 32
    with database.transaction() as session:
        assert webhook_secret(session, "other") != first
        second = rotate_secret(session, "local")
        assert webhook_secret(session, "local") == second != first
        assert signing_secrets(session, "local") == [second, first]
    execute(database, "UPDATE webhook_secrets SET previous_until = clock_timestamp()")
    with database.transaction() as session:
        assert signing_secrets(session, "local") == [second]
        assert len(rotate_secret(session, "new")) == 32
