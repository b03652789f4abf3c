"""The schema's migrations and its weekly partitions."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import migrations
from runtime.clock import WEEK, utc_now, uuid7_floor, week_start
from runtime.logs import get_logger
from store.database import Database

log = get_logger(__name__)

PARTITIONED = ("jobs", "results")
WEEKS_AHEAD = 4


def migrate(database: Database) -> None:
    """Bring the schema to the newest revision, with partitions; safe to call from several processes at once."""
    with database.transaction() as session:
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext('stoker_migrate'))"))
        config = _alembic_config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")
        make_partitions(session, now=utc_now())


def schema_revisions(session: Session) -> tuple[str | None, str | None]:
    """(revision of the database or None, newest revision of this code)."""
    current = MigrationContext.configure(session.connection()).get_current_revision()
    return current, ScriptDirectory.from_config(_alembic_config()).get_current_head()


def make_partitions(session: Session, *, now: datetime) -> None:
    """Create this week's partitions of jobs and results and the next four weeks'; existing ones stay.

    A batch whose week has no partition lands in the DEFAULT partition, so a missed call loses nothing.
    """
    existing = set(session.scalars(text("SELECT relname FROM pg_class WHERE relispartition")))
    for week in range(WEEKS_AHEAD + 1):
        start = week_start(now) + week * WEEK
        for table in PARTITIONED:
            name = partition_name(table, start)
            if name not in existing:
                _make_partition(session, name, table=table, start=start)


def partition_name(table: str, start: datetime) -> str:
    """jobs_2026w48 for the week that begins at `start`."""
    year, week, _ = start.isocalendar()
    return f"{table}_{year}w{week:02}"


def partition_start(name: str) -> datetime | None:
    """The week that a partition of this name begins with; None for DEFAULT and what we did not make."""
    found = re.fullmatch(r"(?:jobs|results)_(\d{4})w(\d{2})", name)
    return datetime.strptime(f"{found[1]} {found[2]} 1 +0000", "%G %V %u %z") if found else None


def _make_partition(session: Session, name: str, *, table: str, start: datetime) -> None:
    """Create one partition, unless that would wait for others or DEFAULT has rows of its week: then it stays there."""
    bounds = f"FROM ('{uuid7_floor(start)}') TO ('{uuid7_floor(start + timedelta(weeks=1))}')"
    try:
        with session.begin_nested():
            session.execute(text("SET LOCAL lock_timeout = '2s'"))
            session.execute(text(f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF {table} FOR VALUES {bounds}"))
    except DBAPIError as error:
        log.warning("partition_not_made", name=name, error=str(error.orig))


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config
