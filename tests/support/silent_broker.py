"""A broker for tests whose workers ask Postgres, and a leader over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.dispatch import Dispatcher
from runtime.settings import Settings, WorkerSettings
from store.database import Database
from store.presence import PresenceBoard

LEADERS_LEASE_S = 1.0  # a leader spares all leases for so long after Postgres has started


class SilentBroker:
    """Takes hints and loses them."""

    def publish(self, shards: object) -> None:
        return

    def ready_count(self) -> int:
        return 10_000

    def invite(self, readers: int) -> None:
        raise AssertionError("no document was added")


@contextmanager
def quiet_leader(database: Database, redis_url: str, *, lease_s: float = LEADERS_LEASE_S) -> Iterator[Dispatcher]:
    """One that leads, and sends nothing."""
    board = PresenceBoard(redis_url)
    try:
        yield Dispatcher(
            database, SilentBroker(), board, Settings.model_construct(worker=WorkerSettings(lease_s=lease_s))
        )
    finally:
        board.close()
