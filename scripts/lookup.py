"""From a batch's name on the command line to its rows: the database of the settings, the batch that is meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from models.names import batch_hex
from pipeline.begin import TENANT as TENANT
from runtime.errors import BadInput, NotFound
from runtime.settings import Settings
from store.batches import BatchProgress, batch_progress, find_batches
from store.database import Database


@contextmanager
def opened_database(settings: Settings) -> Iterator[Database]:
    """Connections to the settings' Postgres, closed at the end of the block."""
    database = Database(settings.require_postgres())
    try:
        yield database
    finally:
        database.close()


def named_batch(database: Database, name: str) -> UUID:
    """The batch whose id begins so. Raises NotFound if there is none, BadInput if there are several."""
    with database.transaction() as session:
        found = find_batches(session, batch_hex(name), tenant=TENANT)
    if not found:
        raise NotFound(f"no batch {name}; `stoker status` lists them")
    if len(found) > 1:
        raise BadInput(f"{name} is the beginning of several batches; write more of it")
    return found[0]


def progress_of(database: Database, name: str) -> BatchProgress:
    """The progress of the batch of this name; raises as `named_batch`."""
    batch_id = named_batch(database, name)
    with database.transaction() as session:
        return batch_progress(session, batch_id, tenant=TENANT)
