"""A process's connections to Postgres, and the transactions over them.

`Database` is the only place that commits. Fork first, then make one: connections are never shared
between processes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import psycopg
from sqlalchemy import URL, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session as Session  # callers name it without knowing SQLAlchemy

from runtime.errors import BadInput, Deadlocked, LockHeld, ServiceUnreachable, Unstorable
from runtime.settings import without_secrets
from store import arrays

CONNECT_TIMEOUT_S = 5
APPLICATION_NAME_MAX = 63  # Postgres cuts longer ones
# Connection errors, out of resources, operator intervention, and 25 for a server that has turned read-only.
_OUTAGES = frozenset({"08", "25", "53", "57"})
_KINDS = {"40P01": Deadlocked, "55P03": LockHeld}
_UNMIGRATED = frozenset({"42P01", "42703"})
# (SQLSTATE, what libpq says where it hands on no SQLSTATE, i.e. while connecting, what is wrong, the remedy).
_KNOWN = (
    (
        "53300",
        ("too many clients", "remaining connection slots", "too many connections"),
        "has no free connection",
        "raise its max_connections, or run fewer workers or a smaller STOKER_POSTGRES__POOL_SIZE",
    ),
    (
        "57P03",
        ("database system is",),
        "takes no connections now",
        "wait until it has started, or see its log if it does not, work goes on by itself",
    ),
    (
        "53100",
        ("No space left on device",),
        "cannot write, its disk is full",
        "free space on the disk of its server, then work goes on by itself, nothing is lost",
    ),
    (
        "40P01",
        (),
        "ended this transaction, as it and another waited for each other",
        "a worker goes on by itself, a command may be repeated",
    ),
    (
        "55P03",
        (),
        "has others' work in the way",
        "nothing was changed, wait for their end or end them, and repeat it",
    ),
    ("42P01", (), "lacks a table of this version", "run `stoker migrate`"),
    ("42703", (), "lacks a column of this version", "run `stoker migrate`"),
)
# A host that vanished is noticed in half a minute, on both sides: the server then frees the leader's lock.
# A process frozen inside a transaction keeps its row locks: the server ends it, as no step of ours pauses so long.
_LIMITS: Mapping[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_OPTIONS = (
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 "
    "-c tcp_user_timeout=20000 -c idle_in_transaction_session_timeout=20000"
)
# A prepared statement's plan is kept while its tables grow, until autovacuum has looked at them.
_BY_KEY = " -c plan_cache_mode=force_custom_plan"


class Database:
    """Connections to one Postgres database.

    Raises ServiceUnreachable from every method when the server does not answer, the connection breaks, or the
    tables are not those of this version.

    `by_key`: this process asks the same questions all day, each for a few rows; each is planned for the tables as large
    as they are then.
    """

    def __init__(self, url: str, *, pool_size: int = 5, by_key: bool = False) -> None:
        self._url = _read_url(url)
        self.address = without_secrets(url)
        self._process = f"stoker {os.getpid()} on {socket.gethostname()}"[:APPLICATION_NAME_MAX]
        self._options = _OPTIONS + (_BY_KEY if by_key else "")
        self._engine = create_engine(
            self._url,
            pool_size=pool_size,
            max_overflow=2,
            pool_pre_ping=True,
            hide_parameters=True,  # prompts and digests of keys would stand in tracebacks
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "application_name": self._process,
                "options": self._options,
                **_LIMITS,
            },
        )
        event.listen(self._engine, "connect", lambda connection, _: arrays.register(connection))

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
                application_name=self._process,
                options=self._options,
                **_LIMITS,
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
        except PoolTimeout as error:
            raise ServiceUnreachable("all connections of this process to Postgres are in use; try again") from error
        except (DataError, UnicodeEncodeError) as error:
            raise Unstorable(str(error).splitlines()[0]) from error
        except DBAPIError as error:
            state = str(getattr(error.orig, "sqlstate", None) or "")
            if error.connection_invalidated or state[:2] in _OUTAGES or state in _UNMIGRATED:
                raise self._unreachable(error) from error
            raise

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        original = getattr(error, "orig", error)
        causes = str(original).strip().splitlines()
        cause = causes[0] if causes else "connection broken"
        found = getattr(original, "sqlstate", None)
        for state, sayings, wrong, remedy in _KNOWN:
            if found == state or any(saying in cause for saying in sayings):
                kind = _KINDS.get(found or "", ServiceUnreachable)
                return kind(f"Postgres at {self.address} {wrong}: {cause}; {remedy}")
        return ServiceUnreachable(
            f"Postgres at {self.address} does not answer: {cause}; check STOKER_POSTGRES__URL and that the server runs"
        )


def copy_cursor(session: Session) -> psycopg.Cursor[Any]:
    """A psycopg cursor in the session's own transaction: SQLAlchemy has no COPY."""
    return cast(psycopg.Connection, session.connection().connection.driver_connection).cursor()


def _read_url(url: str) -> URL:
    try:
        return make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError) as error:
        raise BadInput(
            f"STOKER_POSTGRES__URL: {without_secrets(url)!r} is no address; write postgresql://user:password@host:5432/name"
        ) from error


def libpq_url(url: URL) -> str:
    """The URL as libpq takes it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
