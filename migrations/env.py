"""Alembic's entry: runs revisions on a connection handed over by `store.schema`, or by the URL in -x url=…"""

from __future__ import annotations

from typing import Any, Final

from alembic import context
from sqlalchemy import Connection, create_engine

from models import cost_rows, document_rows, gateway_rows, schedule_rows  # noqa: F401  # their tables belong to the metadata
from models.rows import Base

# Who waits for a table stops everybody who comes after. Below Postgres's deadlock_timeout of 1 s: where a worker and a
# migration wait for each other, it is the migration that gives way.
LOCK_TIMEOUT: Final = "500ms"


def _not_a_partition(obj: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
    """Leave out weekly partitions, and what belongs to them: they are made at run time."""
    table = name if kind == "table" else getattr(getattr(obj, "table", None), "name", None)
    return not (table or "").startswith(("jobs_", "results_"))


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=_not_a_partition,
        compare_type=True,
    )
    with context.begin_transaction():
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        context.run_migrations()


if given := context.config.attributes.get("connection"):
    _run(given)
else:
    with create_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as connection:
        _run(connection)
