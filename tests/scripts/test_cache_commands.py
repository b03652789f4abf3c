"""`stoker cache` beside a running batch, on real Postgres and Redis."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

from click.testing import CliRunner
from sqlalchemy import text

from runtime.errors import NotFound
from runtime.settings import PostgresSettings, RedisSettings, Settings
from scripts.cache_commands import cache
from store.database import Database
from store.engines import register_engine
from store.namespaces import NewLookup, NewNamespace, hold_namespace, open_namespaces, write_lookups
from tests.support.waiting import wait_until

NEW = NewNamespace(b"key", "", "", "", "", "", "", b"secret", "")


def is_somebody_waiting(database: Database) -> bool:
    """Whether a transaction in this database waits for another."""
    with database.transaction() as session:
        return bool(
            session.scalar(
                text("""
            SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0""")
            )
        )


def test_a_clear_that_postgres_ended_for_a_workers_write_is_done_again(
    database: Database, postgres_url: str, redis_url: str
) -> None:
    batch_id = uuid4()
    with database.transaction() as session:
        known = open_namespaces(session, "local", [NEW])[b"key"].id
        write_lookups(session, batch_id, [NewLookup(0, known, 1, 0, 0, 0, 0.0, 0.0, False, False, False, None, None)])
    settings = Settings.model_construct(postgres=PostgresSettings(url=postgres_url), redis=RedisSettings(url=redis_url))
    with ThreadPoolExecutor() as pool, database.transaction() as worker:
        worker.execute(text("UPDATE cache_lookups SET tokens = 1"))
        clear = pool.submit(CliRunner().invoke, cache, ["clear"], obj=settings)
        wait_until(lambda: is_somebody_waiting(database), 10.0, "the clear waits for the worker's row")
        # The clear began to wait first, and so is first to find that now neither can go on.
        assert hold_namespace(worker, known) is not None
    said = clear.result()
    assert said.exit_code == 0, said.output
    assert "and 1 namespace with certificate" in said.output
    with database.transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM cache_lookups")) == 0


def test_a_checkpoint_that_no_engine_had_is_no_checkpoint(
    postgres_url: str, redis_url: str, database: Database
) -> None:
    settings = Settings.model_construct(postgres=PostgresSettings(url=postgres_url), redis=RedisSettings(url=redis_url))
    with database.transaction() as session:
        register_engine(session, {"checkpoint_digest": "sha256:1234"})
        register_engine(session, {"url": "http://127.0.0.1:8000"})
    for known in ("sha256:1234", "http://127.0.0.1:8000"):
        said = CliRunner().invoke(cache, ["clear", "--checkpoint", known], obj=settings)
        assert said.exit_code == 0 and "the checkpoint's answers forgotten" in said.output
    said = CliRunner().invoke(cache, ["clear", "--checkpoint", "sha256:12"], obj=settings)
    assert isinstance(said.exception, NotFound) and "'sha256:12'" in str(said.exception)
