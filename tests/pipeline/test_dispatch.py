"""The dispatch leader: what it sends, what it sends again, who leads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dispatch import BLIND_WINDOW, Dispatcher, dispatch_until, fair_share
from runtime.clock import uuid7
from runtime.errors import ServiceUnreachable
from runtime.settings import Settings
from store.batches import request_cancel
from store.database import Database
from store.dispatching import Candidates
from store.notifications import leadership
from store.presence import PresenceBoard, WorkerPresence
from tests.support.batches import batch_row, chats, claimed, execute, shards_of, store_batch
from tests.support.waiting import wait_until

SETTINGS = Settings.model_construct()


class MemoryBroker:
    """Keeps the hints that it took; `is_down` and `ready` are what the test says."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.is_down = False
        self.ready = 0

    def publish(self, shards: Sequence[tuple[int, UUID]]) -> None:
        if self.is_down:
            raise ServiceUnreachable("the broker is down")
        self.sent += [shard_id for shard_id, _ in shards]

    def ready_count(self) -> int:
        if self.is_down:
            raise ServiceUnreachable("the broker is down")
        return self.ready


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def board(redis_url: str) -> Iterator[PresenceBoard]:
    opened = PresenceBoard(redis_url)
    yield opened
    opened.close()


@pytest.fixture
def dispatcher(database: Database, broker: MemoryBroker, board: PresenceBoard) -> Dispatcher:
    return Dispatcher(database, broker, board, SETTINGS)


def announce(board: PresenceBoard, *, children: int, name: str = "one") -> None:
    board.announce(WorkerPresence(name=name, children=children, models=["scripted"], engine="none", healthy=True))


def age_hints(database: Database) -> None:
    execute(database, "UPDATE shards SET dispatched_at = dispatched_at - interval '1 min' WHERE state = 'dispatched'")


@st.composite
def waiting_batches(draw: st.DrawFn) -> list[Candidates]:
    batches = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(1, 6)), max_size=6))
    ids = iter(range(1000))
    return [
        Candidates(uuid7(), tenant, live, tuple(next(ids) for _ in range(count))) for tenant, live, count in batches
    ]


@given(waiting_batches(), st.integers(0, 30))
def test_a_share_is_fair(batches: list[Candidates], free: int) -> None:
    chosen = fair_share(batches, free=free)
    of = {batch.batch_id: [shard_id for shard_id in chosen if shard_id in batch.shard_ids] for batch in batches}
    assert len(chosen) == len(set(chosen)) == min(free, sum(len(batch.shard_ids) for batch in batches))
    for batch in batches:
        taken = tuple(of[batch.batch_id])
        assert taken == batch.shard_ids[: len(taken)], "in their order, none left out"
    tenants = {batch.tenant for batch in batches}
    live = {
        name: sum(batch.live_shards + len(of[batch.batch_id]) for batch in batches if batch.tenant == name)
        for name in tenants
    }
    got = {batch.tenant for batch in batches if of[batch.batch_id]}
    waits = {batch.tenant for batch in batches if len(of[batch.batch_id]) < len(batch.shard_ids)}
    assert all(live[rich] <= live[poor] + 1 for rich in got for poor in waits)


@given(st.integers(1, 5), st.integers(0, 40))
def test_tenants_with_enough_waiting_differ_by_one_shard_at_most(tenants: int, free: int) -> None:
    batches = [
        Candidates(uuid7(), f"tenant {number}", 0, tuple(range(number * 100, number * 100 + 40)))
        for number in range(tenants)
    ]
    chosen = fair_share(batches, free=free)
    counts = [len(set(chosen) & set(batch.shard_ids)) for batch in batches]
    assert max(counts) - min(counts) <= 1


def test_among_equals_the_batch_that_must_end_first_goes_first() -> None:
    first, second = uuid7(), uuid7()
    batches = [Candidates(first, "a", 0, (1, 2)), Candidates(second, "a", 0, (3, 4))]
    assert fair_share(batches, free=3) == [1, 3, 2]


def test_the_window_is_the_live_children(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker, board: PresenceBoard
) -> None:
    announce(board, children=3)
    announce(board, children=1, name="two")
    store_batch(database, tmp_path, chats(10), shard_jobs=1)
    dispatcher.tick()
    dispatcher.tick()
    assert len(broker.sent) == 4
    claimed(database, broker.sent[0])
    claimed(database, broker.sent[1])
    dispatcher.tick()
    assert len(set(broker.sent)) == 6


def test_without_presence_a_small_window_is_kept(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker
) -> None:
    store_batch(database, tmp_path, chats(10), shard_jobs=1)
    dispatcher.tick()
    assert len(broker.sent) == BLIND_WINDOW


def test_hints_that_the_broker_did_not_take_are_sent_again(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker
) -> None:
    batch_id = store_batch(database, tmp_path, chats(10), shard_jobs=1)
    broker.is_down = True
    dispatcher.tick()
    dispatcher.tick()
    dispatched = [shard.id for shard in shards_of(database, batch_id) if shard.state == "dispatched"]
    assert (broker.sent, len(dispatched)) == ([], BLIND_WINDOW)
    broker.is_down = False
    dispatcher.tick()
    dispatcher.tick()
    assert sorted(broker.sent) == dispatched


def test_lost_hints_are_sent_again_once_the_queue_holds_too_few(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker
) -> None:
    store_batch(database, tmp_path, chats(10), shard_jobs=1)
    dispatcher.tick()
    first = list(broker.sent)
    dispatcher.sweep()
    assert broker.sent == first, "they are young"
    age_hints(database)
    broker.ready = len(first)
    dispatcher.sweep()
    assert broker.sent == first, "they wait in the queue"
    broker.ready = len(first) - 1
    dispatcher.sweep()
    assert broker.sent == first + first[:1], "as many as the window lacks: any hint leads to any dispatched shard"
    dispatcher.sweep()
    assert broker.sent == first + first[:1], "and are young again"


def test_a_resend_of_lost_hints_does_not_drop_those_not_yet_sent(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker, board: PresenceBoard
) -> None:
    announce(board, children=1)
    batch_id = store_batch(database, tmp_path, chats(10), shard_jobs=1)
    dispatcher.tick()
    age_hints(database)
    announce(board, children=2)
    broker.is_down = True
    dispatcher.sweep()
    dispatcher.fill_window()
    broker.is_down = False
    dispatcher.sweep()
    dispatcher.fill_window()
    dispatched = {shard.id for shard in shards_of(database, batch_id) if shard.state == "dispatched"}
    assert len(dispatched) == 2
    assert set(broker.sent) == dispatched


def test_running_shards_of_a_tenants_other_batches_count_against_it(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker, board: PresenceBoard
) -> None:
    announce(board, children=4)
    store_batch(database, tmp_path, chats(4), shard_jobs=1, tenant="busy")
    dispatcher.tick()
    for shard_id in broker.sent:
        claimed(database, shard_id)
    broker.sent.clear()
    store_batch(database, tmp_path, chats(4), shard_jobs=1, tenant="busy")
    idle = store_batch(database, tmp_path, chats(4), shard_jobs=1, tenant="idle")
    dispatcher.tick()
    assert set(broker.sent) == {shard.id for shard in shards_of(database, idle)}


def test_paused_and_cancelled_batches_are_not_dispatched(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, broker: MemoryBroker
) -> None:
    paused, cancelled = (store_batch(database, tmp_path, chats(2)) for _ in range(2))
    execute(database, "UPDATE batches SET paused_reason = 'by hand' WHERE id = :id", id=paused)
    with database.transaction() as session:
        assert request_cancel(session, cancelled)
    dispatcher.tick()
    assert broker.sent == []
    assert batch_row(database, cancelled)["state"] == "cancelled"


def test_one_of_two_leads_until_its_connection_ends(database: Database) -> None:
    with leadership(database) as second:
        with leadership(database) as first:
            assert first.acquire()
            assert first.acquire(), "asking again changes nothing"
            assert not second.acquire()
        wait_until(second.acquire, 5, "the second leads after the first has gone")


@contextmanager
def dispatching(database: Database, broker: MemoryBroker, board: PresenceBoard) -> Iterator[threading.Event]:
    """A dispatch loop in a thread; the event ends it."""
    stop = threading.Event()
    loop = threading.Thread(
        target=dispatch_until,
        args=(stop,),
        kwargs={"database": database, "publisher": broker, "board": board, "settings": SETTINGS},
    )
    loop.start()
    try:
        yield stop
    finally:
        stop.set()
        loop.join(20)
        assert not loop.is_alive()


def test_a_standby_takes_over_when_the_leader_ends(database: Database, tmp_path: Path, board: PresenceBoard) -> None:
    first, second = MemoryBroker(), MemoryBroker()
    announce(board, children=1)
    with dispatching(database, first, board) as stop_first:
        store_batch(database, tmp_path, chats(5), shard_jobs=1)
        wait_until(lambda: len(first.sent) == 1, 10, "the leader sends a hint")
        with dispatching(database, second, board):
            claimed(database, first.sent[0])
            wait_until(lambda: len(first.sent) == 2, 10, "the leader goes on")
            assert second.sent == []
            stop_first.set()
            claimed(database, first.sent[1])
            wait_until(lambda: len(second.sent) == 1, 10, "the standby sends the next")


def test_dispatch_goes_on_after_its_connections_were_cut(
    database: Database, tmp_path: Path, broker: MemoryBroker, board: PresenceBoard
) -> None:
    with dispatching(database, broker, board):
        store_batch(database, tmp_path, chats(1))
        wait_until(lambda: len(broker.sent) == 1, 10, "the first hint")
        with database.connection(autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        store_batch(database, tmp_path, chats(1))
        wait_until(lambda: len(broker.sent) == 2, 15, "the second hint")
