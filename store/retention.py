"""Deleting what is past its retention: first out of sight, then in small deletes or as a week's partitions.

Every step may be cut off or done twice, also by two leaders at once: the next call goes on where rows are left.
No step waits for others: what a reader or writer holds is left for the next call.
"""

from __future__ import annotations

import time
from datetime import datetime
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from models.states import TERMINAL
from runtime.clock import WEEK, utc_now, uuid7_floor, week_start
from runtime.logs import get_logger
from store.database import Database
from store.schema import PARTITION_LOCK_TIMEOUT, partition_start

log = get_logger(__name__)

MARKED_AT_ONCE = 500  # batches in a transaction
ROWS_AT_ONCE = 2_000  # rows in a transaction; with bodies of a few KB it takes some 10 ms
SLICE_S = 0.25  # deleting in one call, so that dispatch never waits long
# Between out of sight and gone: an export that had begun reads in many short transactions, and would end early.
UNSEEN_S = 1800.0
_PARTS = (
    ("results", "seq"),
    ("jobs", "seq"),
    ("followers", "seq"),
    ("cache_lookups", "seq"),
    ("job_tries", "seq"),
    ("job_steps", "seq"),
    ("shards", "id"),
)
_PAST = """state = ANY(:ended) AND deleted_at IS NULL
    AND ended_at < clock_timestamp() - make_interval(secs => :age)
    AND (CAST(:tenant AS text) IS NULL OR tenant = :tenant)"""
# But for an audit that its policy has not heard of: without it the certificate would be false.
_GONE = {"cache_lookups": "AND (folded OR NOT audited)"}
# One whose shards are gone is deleted but for such audits: its row stays as long as they do, so that they are found.
_DELETABLE = """deleted_at < clock_timestamp() - make_interval(secs => :unseen)
    AND (EXISTS (SELECT FROM shards WHERE batch_id = b.id)
        OR NOT EXISTS (SELECT FROM cache_lookups WHERE batch_id = b.id AND audited AND NOT folded))"""


def delete_past_retention(database: Database, *, retention_s: float) -> bool:
    """One bounded step of it all; whether rows are left that the next call can delete at once."""
    with database.transaction() as session:
        mark_deleted(session, retention_s=retention_s)
        weeks = droppable_partitions(session, now=utc_now())
    end = time.monotonic() + SLICE_S
    for name in weeks:
        with database.transaction() as session:
            drop_partition(session, name)
        if time.monotonic() >= end:
            return True
    while time.monotonic() < end:
        with database.transaction() as session:
            if not delete_some(session):
                return False
    return True


def mark_deleted(session: Session, *, retention_s: float, tenant: str | None = None) -> int:
    """Put batches that ended longer ago than this out of everybody's sight, a tenant's or all; how many of 500."""
    marked = session.scalars(
        text(f"""
        UPDATE batches SET deleted_at = clock_timestamp() WHERE id IN (
            SELECT id FROM batches WHERE {_PAST} ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED)
        RETURNING id"""),
        {**_past(retention_s, tenant), "limit": MARKED_AT_ONCE},
    ).all()
    if marked:
        log.info("batches_past_retention", batches=len(marked))
    return len(marked)


def count_past(session: Session, *, retention_s: float, tenant: str | None = None) -> int:
    """How many batches `mark_deleted` would find."""
    return int(
        session.execute(text(f"SELECT count(*) FROM batches WHERE {_PAST}"), _past(retention_s, tenant)).scalar_one()
    )


def _past(retention_s: float, tenant: str | None) -> dict[str, object]:
    return {"ended": [state.value for state in TERMINAL], "age": retention_s, "tenant": tenant}


def delete_some(session: Session) -> bool:
    """Delete a few thousand rows of one deleted batch, at last its own; False when no batch is left for us."""
    batch_id: UUID | None = session.execute(
        text(f"SELECT id FROM batches b WHERE {_DELETABLE} ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"),
        {"unseen": UNSEEN_S},
    ).scalar_one_or_none()
    if batch_id is None:
        return False
    left = ROWS_AT_ONCE
    for table, key in _PARTS:
        left -= len(
            session.scalars(
                text(f"""
            DELETE FROM {table} WHERE batch_id = :id AND {key} = ANY(ARRAY(
                SELECT {key} FROM {table} WHERE batch_id = :id {_GONE.get(table, "")} ORDER BY {key} LIMIT :limit))
            RETURNING 1"""),
                {"id": batch_id, "limit": left},
            ).all()
        )
        if left <= 0:
            return True
    gone = session.scalar(
        text(f"DELETE FROM batches b WHERE id = :id AND {_DELETABLE} RETURNING 1"),
        {"id": batch_id, "unseen": UNSEEN_S},
    )
    log.info("batch_deleted", batch_id=str(batch_id), audits_kept=gone is None)
    return True


def droppable_partitions(session: Session, *, now: datetime) -> list[str]:
    """The weekly partitions, before this week's, that hold rows of deleted batches only, or none."""
    names = session.scalars(
        text("""
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent IN (CAST('jobs' AS regclass), CAST('results' AS regclass)) ORDER BY c.relname""")
    ).all()
    return [name for name in names if _is_past(name, now=now) and _is_unneeded(session, name)]


def drop_partition(session: Session, name: str) -> bool:
    """Drop one week's partition if nobody holds it and it still is unneeded; False leaves it for another call."""
    table = name.partition("_")[0]
    try:
        with session.begin_nested():
            session.execute(text(f"SET LOCAL lock_timeout = '{PARTITION_LOCK_TIMEOUT}'"))
            session.execute(text(f"LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE"))
            session.execute(text(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE"))
            if not _is_unneeded(session, name):  # a batch that was stored before we had the lock
                return False
            session.execute(text(f"DROP TABLE {name}"))
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        log.info("partition_not_dropped", name=name, error=str(error.orig))
        return False
    log.info("partition_dropped", name=name)
    return True


def _is_past(name: str, *, now: datetime) -> bool:
    start = partition_start(name)
    return start is not None and start < week_start(now)


def _is_unneeded(session: Session, name: str) -> bool:
    """Whether every batch with an id of that week is deleted, long enough that nobody reads it."""
    start = partition_start(name)
    if start is None:
        return False
    return bool(
        session.execute(
            text("""
        SELECT NOT EXISTS (SELECT FROM batches WHERE id >= :low AND id < :high
          AND (deleted_at IS NULL OR deleted_at >= clock_timestamp() - make_interval(secs => :unseen)))"""),
            {"low": uuid7_floor(start), "high": uuid7_floor(start + WEEK), "unseen": UNSEEN_S},
        ).scalar_one()
    )
