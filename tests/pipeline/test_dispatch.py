"""The dispatch leader: what it sends, what it sends again, who leads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text

from pipeline.dispatch import BLIND_WINDOW, Dispatcher, dispatch_until
from pipeline.finishing import Finisher
from runtime.errors import ServiceUnreachable
from runtime.settings import Settings
from store.batches import request_cancel
from store.database import Database
from store.notifications import leadership
from store.presence import PresenceBoard, WorkerPresence
from store.shards import claim_next
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

    def invite(self, readers: int) -> None:
        raise AssertionError("no document was added")


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


def test_a_new_tenants_first_shard_is_claimed_next_though_the_window_was_full(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, board: PresenceBoard
) -> None:
    announce(board, children=4)
    busy = store_batch(database, tmp_path, chats(12), shard_jobs=1, tenant="busy")
    dispatcher.tick()
    with database.transaction() as session:
        for _ in range(4):
            assert claim_next(session, holder="test", lease_s=30.0)
    dispatcher.tick()
    new = store_batch(database, tmp_path, chats(2), shard_jobs=1, tenant="new")
    dispatcher.tick()
    order = []
    with database.transaction() as session:
        while taken := claim_next(session, holder="test", lease_s=30.0):
            order.append(taken.batch_id)
    assert order[0] == new
    assert len(order) == 4 and set(order[:3]) == {new, busy} and order.count(new) == 2
    assert len({shard.id for shard in shards_of(database, busy) if shard.state == "pending"}) == 6


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
            assert first.acquire(silent_s=60.0)
            assert first.acquire(silent_s=60.0), "asking again changes nothing"
            assert not second.acquire(silent_s=60.0)
        wait_until(lambda: second.acquire(silent_s=60.0), 5, "the second leads after the first has gone")


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


def test_dispatch_goes_on_after_its_connections_were_cut_and_trusts_no_count_of_before(
    database: Database, tmp_path: Path, broker: MemoryBroker, board: PresenceBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = threading.Event()
    monkeypatch.setattr(Finisher, "forget", lambda _: forgotten.set())
    with dispatching(database, broker, board):
        store_batch(database, tmp_path, chats(1))
        wait_until(lambda: len(broker.sent) == 1, 10, "the first hint")
        forgotten.clear()
        with database.connection(autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        store_batch(database, tmp_path, chats(1))
        wait_until(lambda: len(broker.sent) == 2, 15, "the second hint")
        assert forgotten.is_set()


def test_a_leader_that_is_frozen_is_succeeded_and_finds_its_lock_gone_when_it_wakes(database: Database) -> None:
    with leadership(database) as second:
        with pytest.raises(ServiceUnreachable), leadership(database) as frozen:
            assert frozen.acquire(silent_s=60.0)
            assert not second.acquire(silent_s=60.0)
            wait_until(lambda: second.acquire(silent_s=0.3), 10, "the silent leader is ended")
            frozen.acquire(silent_s=60.0)
        assert second.acquire(silent_s=60.0)


BUSY_LEADER = """
import sys
from sqlalchemy import text
from store.database import Database
from store.notifications import leadership

database = Database(sys.argv[1])
with leadership(database) as lead, database.transaction() as session:
    assert lead.acquire(silent_s=60.0)
    print("leads", flush=True)
    session.execute(text("SELECT pg_sleep(2)"))
    assert lead.acquire(silent_s=60.0)
"""


def test_a_leader_in_the_middle_of_a_long_statement_stays(database: Database, postgres_url: str) -> None:
    busy = subprocess.Popen([sys.executable, "-c", BUSY_LEADER, postgres_url], stdout=subprocess.PIPE)
    assert busy.stdout is not None
    busy.stdout.readline()
    with leadership(database) as second:
        while busy.poll() is None:
            taken = second.acquire(silent_s=0.3)
            assert not taken or busy.wait(5) == 0, "it took over from a leader that was busy"
    busy.stdout.close()
    assert busy.returncode == 0


LEADER_STOPS_INSIDE_A_FILL = """
import os, signal, sys
from sqlalchemy import text
from store.database import Database
from store.notifications import leadership

database = Database(sys.argv[1])
with leadership(database) as lead, database.transaction() as session:
    assert lead.acquire(silent_s=60.0)
    session.execute(text("UPDATE batches SET cursor = cursor"))
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_frozen_leader_loses_also_the_rows_that_it_had_locked(
    database: Database, postgres_url: str, tmp_path: Path
) -> None:
    store_batch(database, tmp_path, chats(1))
    frozen = subprocess.Popen([sys.executable, "-c", LEADER_STOPS_INSIDE_A_FILL, postgres_url])
    try:
        os.waitpid(frozen.pid, os.WUNTRACED)  # returns when it has stopped
        with leadership(database) as second:
            wait_until(lambda: second.acquire(silent_s=0.3), 10, "the silent leader is ended")
            with database.transaction() as session:
                session.execute(text("SET LOCAL lock_timeout = '2s'"))
                assert len(session.execute(text("UPDATE batches SET cursor = cursor RETURNING 1")).all()) == 1
    finally:
        frozen.kill()
        frozen.wait()


def test_a_process_frozen_inside_a_transaction_loses_its_locks(database: Database) -> None:
    with database.transaction() as session:
        limit = session.scalar(text("SHOW idle_in_transaction_session_timeout"))
    assert limit == "20s", "Postgres itself ends it then"
