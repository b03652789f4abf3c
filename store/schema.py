"""The schema's migrations, which run while others work, and its weekly partitions."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import migrations
from runtime.clock import WEEK, utc_now, uuid7_floor, week_start
from runtime.errors import Deadlocked, LockHeld
from runtime.logs import get_logger
from store.database import Database
from store.revisions import schema_revisions

log = get_logger(__name__)

PARTITIONED = ("jobs", "results")
WEEKS_AHEAD = 4
# A revision that waits for a table stops everybody who comes after it for as long as migrations/env.py lets it wait,
# so between two tries all of them get on with their work.
PAUSE_S = (1.0, 3.0)
PATIENCE_S = 120.0
# The lock on a partitioned table stops everybody who comes after it; far below deadlock_timeout, so no deadlock.
PARTITION_LOCK_TIMEOUT = "100ms"


def migrate(database: Database, *, patience_s: float = PATIENCE_S) -> tuple[str | None, str | None]:
    """Bring the schema to the newest revision, with partitions; safe to repeat, and in several processes at once.

    Answers the revision before (None: an empty database) and after.

    Each revision is a transaction of its own, and is tried again while others hold a table that it needs. Raises
    LockHeld after so many seconds, saying who did: revisions that were done before stay.
    """
    before = _current(database)
    until = time.monotonic() + patience_s
    while True:
        try:
            if not _step(database):
                break
        except (LockHeld, Deadlocked) as error:
            holders = _long_transactions(database)
            if time.monotonic() >= until:
                told = f"; open for longest: {holders}" if holders else ""
                raise LockHeld(f"{error}{told}") from error
            log.warning("migration_waits", error=str(error), open=holders)
            time.sleep(random.uniform(*PAUSE_S))  # noqa: S311
    make_partitions(database, now=utc_now())
    return before, _current(database)


def make_partitions(database: Database, *, now: datetime) -> None:
    """Create this week's partitions of jobs and results and the next four weeks'; existing ones stay.

    Each in a transaction of its own, up to the first that others' locks are in the way of: the next call goes on there.
    A batch whose week has no partition lands in the DEFAULT partition, so a missed call loses nothing.
    """
    with database.transaction() as session:
        existing = set(session.scalars(text("SELECT relname FROM pg_class WHERE relispartition")))
    for week in range(WEEKS_AHEAD + 1):
        start = week_start(now) + week * WEEK
        for table in PARTITIONED:
            name = partition_name(table, start)
            if name not in existing and not _make_partition(database, name, table=table, start=start):
                return


def partition_name(table: str, start: datetime) -> str:
    """jobs_2026w48 for the week that begins at `start`."""
    year, week, _ = start.isocalendar()
    return f"{table}_{year}w{week:02}"


def partition_start(name: str) -> datetime | None:
    """The week that a partition of this name begins with; None for DEFAULT and what we did not make."""
    found = re.fullmatch(r"(?:jobs|results)_(\d{4})w(\d{2})", name)
    return datetime.strptime(f"{found[1]} {found[2]} 1 +0000", "%G %V %u %z") if found else None


def _make_partition(database: Database, name: str, *, table: str, start: datetime) -> bool:
    """Create one partition, unless DEFAULT has rows of its week: they stay there. False if others hold the table."""
    bounds = f"FROM ('{uuid7_floor(start)}') TO ('{uuid7_floor(start + timedelta(weeks=1))}')"
    try:
        with database.transaction() as session:
            session.execute(text(f"SET LOCAL lock_timeout = '{PARTITION_LOCK_TIMEOUT}'"))
            session.execute(text(f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF {table} FOR VALUES {bounds}"))
    except (LockHeld, Deadlocked) as error:
        log.warning("partition_not_made", name=name, error=str(error))
        return False
    except DBAPIError as error:
        log.warning("partition_not_made", name=name, error=str(error.orig))
    return True


def _current(database: Database) -> str | None:
    with database.transaction() as session:
        return schema_revisions(session).current


def _step(database: Database) -> bool:
    """Apply the next revision, if there is one; False once there is none."""
    with _alone(database) as session:
        revisions = schema_revisions(session)
        if revisions.is_ahead:
            log.warning("schema_is_newer", revision=revisions.current, known=revisions.newest)
        if not revisions.is_behind:
            return False
        config = _alembic_config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "+1")
        return True


@contextmanager
def _alone(database: Database) -> Iterator[Session]:
    """A transaction that no other process which migrates is in."""
    with database.transaction() as session:
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext('stoker_migrate'))"))
        yield session


def _long_transactions(database: Database) -> str:
    """Who has had a transaction open for a second or more, in words: mostly whom a migration waits for."""
    with database.transaction() as session:
        rows = session.execute(
            text("""
            SELECT coalesce(nullif(application_name, ''), usename) AS name, pid,
              CAST(extract(epoch FROM clock_timestamp() - xact_start) AS int) AS open_s
            FROM pg_stat_activity
            WHERE datname = current_database() AND xact_start < clock_timestamp() - interval '1 s'
            ORDER BY xact_start LIMIT 3""")
        ).all()
    return ", ".join(f"{row.name} (server process {row.pid}, {row.open_s} s)" for row in rows)


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config
