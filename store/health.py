"""What doctor asks Postgres."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.notifications import LEADER_LOCK


def postgres_version(session: Session) -> str:
    """The server's version, such as 15.19."""
    return str(session.execute(text("SHOW server_version")).scalar_one()).split()[0]


def has_dispatch_leader(session: Session) -> bool:
    """Whether some process holds the dispatch lock of this database."""
    return bool(
        session.execute(
            text("""
        SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = :lock AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""),
            {"lock": LEADER_LOCK},
        ).scalar_one()
    )


def probe_write(session: Session) -> None:
    """Write about 1 MB as the batches' tables would be written, and roll it back.

    A full disk fails it: a table's file is extended at once, whatever is buffered.
    """
    with session.begin_nested() as attempt:
        session.execute(text("SET LOCAL temp_tablespaces = ''"))
        session.execute(
            text("CREATE TEMPORARY TABLE stoker_probe AS SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
        )
        attempt.rollback()
