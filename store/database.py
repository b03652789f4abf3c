"""A process's connections to Postgres, and the transactions over them.

`Database` is the only place that commits. Fork first, then make one: connections are never shared
between processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session as Session  # callers name it without knowing SQLAlchemy

from runtime.errors import ServiceUnreachable, Unstorable
from runtime.settings import without_secrets

CONNECT_TIMEOUT_S = 5


class Database:
    """Connections to one Postgres database.

    Raises ServiceUnreachable from every method when the server does not answer or the connection breaks.
    """

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        self._url = make_url(url).set(drivername="postgresql+psycopg")
        self.address = without_secrets(url)
        self._engine = create_engine(
            self._url,
            pool_size=pool_size,
            max_overflow=2,
            pool_pre_ping=True,
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "stoker"},
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end of the block, rolled back on any error."""
        with self._translated(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def connection(self, *, autocommit: bool = False) -> Iterator[psycopg.Connection]:
        """A psycopg connection of its own, outside the pool: for COPY, LISTEN and advisory locks."""
        with (
            self._translated(),
            psycopg.connect(
                libpq_url(self._url),
                autocommit=autocommit,
                connect_timeout=CONNECT_TIMEOUT_S,
                application_name="stoker",
            ) as connection,
        ):
            yield connection

    def close(self) -> None:
        """Close all pooled connections."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError, psycopg.OperationalError) as error:
            raise self._unreachable(error) from error
        except (DataError, UnicodeEncodeError) as error:
            raise Unstorable(str(error).splitlines()[0]) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise self._unreachable(error) from error
            raise

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        cause = str(getattr(error, "orig", error)).strip().splitlines()
        return ServiceUnreachable(
            f"Postgres at {self.address} does not answer: {cause[0] if cause else 'connection broken'}; "
            "check STOKER_POSTGRES__URL and that the server runs"
        )


def libpq_url(url: URL) -> str:
    """The URL as libpq takes it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
