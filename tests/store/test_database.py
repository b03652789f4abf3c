"""What is said of Postgres's errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from sqlalchemy import text

from runtime.errors import Deadlocked
from store.database import Database, Session


def lock(session: Session, number: int) -> None:
    session.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})


def test_a_deadlock_is_called_one_and_no_outage(database: Database) -> None:
    both_have_one = Barrier(2, timeout=10.0)

    def cross(first: int, second: int) -> str:
        try:
            with database.transaction() as session:
                lock(session, first)
                both_have_one.wait()
                lock(session, second)
        except Deadlocked as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(cross, (1, 2), (2, 1)))
    assert "" in said
    assert "it and another waited for each other: deadlock detected" in "".join(said)
