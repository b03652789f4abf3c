"""Which revision the schema has, and which ones this code knows; read at every start, so without alembic's modules."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import text
from sqlalchemy.orm import Session

import migrations
from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from store.database import Database

log = get_logger(__name__)

LOOK_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Revisions:
    """Which revision the database has, None before the first one, and which ones this code knows, oldest first."""

    current: str | None
    known: list[str]

    @property
    def newest(self) -> str:
        """The one that this code is written for."""
        return self.known[-1]

    @property
    def is_behind(self) -> bool:
        """Whether the database lacks what this code may ask for."""
        return self.current in (None, *self.known[:-1])

    @property
    def is_ahead(self) -> bool:
        """Whether newer code has migrated the database. Ours goes on: what a revision takes away is long unused."""
        return self.current not in (None, *self.known)


def schema_revisions(session: Session) -> Revisions:
    """What the database has and this code knows."""
    current = None
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is not None:
        current = session.scalar(text("SELECT version_num FROM alembic_version"))
    files = (Path(migrations.__file__).parent / "versions").glob("[0-9]*.py")
    return Revisions(current, sorted(file.name.partition("_")[0] for file in files))


def await_database(database: Database, stop: threading.Event | None = None) -> None:
    """As await_schema, and wait for Postgres too while it is away."""
    stop = stop or threading.Event()
    told = None
    while not stop.is_set():
        try:
            await_schema(database, stop)
            return
        except ServiceUnreachable as error:
            if str(error) != told:
                told = str(error)
                log.warning("schema_waits", error=told)
            stop.wait(LOOK_S)


def await_schema(database: Database, stop: threading.Event | None = None) -> None:
    """Return once the database has what this code asks for, or at `stop`; the log says what is waited for.

    So a process of a newer version may be started before `stoker migrate`, and takes nothing from those that work.
    """
    stop = stop or threading.Event()
    told = None
    while not stop.is_set():
        with database.transaction() as session:
            revisions = schema_revisions(session)
        if revisions.is_ahead:
            log.warning("schema_is_newer", revision=revisions.current, known=revisions.newest)
        if not revisions.is_behind:
            return
        if revisions != told:
            told = revisions
            found = {"revision": revisions.current, "needed": revisions.newest}
            log.warning("schema_waits", **found, remedy="run `stoker migrate`")
        stop.wait(LOOK_S)
