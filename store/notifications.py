"""Waking the dispatch loop and the validators through Postgres NOTIFY, and the lock that makes dispatch one loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import text
from sqlalchemy.orm import Session

from runtime.errors import ServiceUnreachable
from store.database import Database

CHANNEL = "stoker_dispatch"
VALIDATE_CHANNEL = "stoker_validate"  # a batch waits for a validator, or has ended
LEADER_LOCK = 0x73746F6B  # "stok": one dispatch leader a database


_END_SILENT_LEADER = """
SELECT pg_terminate_backend(every.pid)
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
JOIN pg_stat_activity every ON every.datid = a.datid AND every.application_name = a.application_name
WHERE l.locktype = 'advisory' AND l.objid = %(lock)s AND l.granted AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND every.pid <> pg_backend_pid()
  AND NOT EXISTS (
    SELECT FROM pg_stat_activity alive WHERE alive.datid = a.datid AND alive.application_name = a.application_name
      AND alive.pid <> pg_backend_pid()
      AND (alive.state = 'active' OR alive.state_change > clock_timestamp() - make_interval(secs => %(silent_s)s)))"""


def wake_dispatch(session: Session) -> None:
    """Wake the dispatch leader when this transaction commits."""
    wake(session, CHANNEL)


def wake(session: Session, channel: str) -> None:
    """Wake who listens on a channel when this transaction commits."""
    session.execute(text("SELECT pg_notify(:channel, '')"), {"channel": channel})


def wait_for_news(connection: psycopg.Connection, timeout_s: float) -> None:
    """Return at the next notification that the connection listens for, or after the time.

    Raises ServiceUnreachable if the connection broke.
    """
    try:
        for _ in connection.notifies(timeout=timeout_s, stop_after=1):
            pass
    except psycopg.OperationalError as error:
        raise ServiceUnreachable(f"Postgres: {error}") from error


class Leadership:
    """The dispatch leader's own connection: holds the lock, hears the notifications.

    Postgres frees the lock when the connection ends, so a killed leader is succeeded at once.
    """

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def acquire(self, *, silent_s: float) -> bool:
        """Whether this process leads; asking again while it leads is true and changes nothing.

        A leader asks at each of its ticks. One that has not asked for `silent_s` is frozen, or its host is: the
        kernel still keeps its connections, and with them its locks, so all of that process are ended here, and the
        next asking may lead. One with a statement under way, or just ended, is busy. What a frozen leader does
        when it wakes is harmless: each of its statements holds by itself.
        """
        row = self._connection.execute(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() "
            "AND objid = %(lock)s) OR pg_try_advisory_lock(%(lock)s)",
            {"lock": LEADER_LOCK},
        ).fetchone()
        if not (row and row[0]):
            self._connection.execute(_END_SILENT_LEADER, {"lock": LEADER_LOCK, "silent_s": silent_s})
        return bool(row and row[0])

    def wait(self, timeout_s: float) -> None:
        """Return at the next notification, or after the time; many notifications wake once.

        Raises ServiceUnreachable if the connection broke: the lock is gone then.
        """
        wait_for_news(self._connection, timeout_s)


@contextmanager
def listening(database: Database, channel: str) -> Iterator[psycopg.Connection]:
    """A connection that hears a channel's notifications."""
    with database.connection(autocommit=True) as connection:
        connection.execute(f"LISTEN {channel}")
        yield connection


@contextmanager
def leadership(database: Database) -> Iterator[Leadership]:
    """A connection that can lead, listening for notifications."""
    with listening(database, CHANNEL) as connection:
        yield Leadership(connection)
