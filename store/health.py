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
