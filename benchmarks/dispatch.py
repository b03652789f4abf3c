"""Cost of the dispatch leader's tick as batches grow, and how long a small batch waits behind a large one.

    python -m benchmarks.dispatch [--shards 10000 100000 1000000]
    python -m benchmarks.dispatch --children 8 80 800

A database of its own at --postgres; shards are rows only, their jobs are not stored. With --children one batch, and
windows for so many children instead. Prints a table and writes benchmarks/results/dispatch.json, or
dispatch_children.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url, text

from benchmarks.paired import keep, made_with
from pipeline.dispatch import Dispatcher
from runtime.clock import uuid7
from runtime.settings import Settings
from store.database import Database, libpq_url
from store.presence import PresenceBoard, WorkerPresence
from store.schema import migrate
from store.shards import claim_next

CHILDREN = 8
WIDE_SHARDS = 100_000  # of the batch with more children
TICKS = 300


class CountingBroker:
    """Takes every hint at once: the broker's own time is not measured here."""

    def publish(self, shards: object) -> None:
        return

    def ready_count(self) -> int:
        return 0

    def invite(self, readers: int) -> None:
        raise AssertionError("no document was added")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", default="postgresql://postgres@127.0.0.1:5432")
    parser.add_argument("--redis", default="redis://127.0.0.1:6379/14")
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--children", type=int, nargs="+", default=[])
    options = parser.parse_args()
    if options.children:
        rows = [_measured(options, WIDE_SHARDS, 0.0, children) for children in options.children]
        keep("dispatch_children", {"made_with": made_with(), "rows": rows})
    else:
        sizes = [(shards, done_share) for shards in options.shards for done_share in (0.0, 0.9)]
        rows = [_measured(options, *size, CHILDREN) for size in sizes]
        keep("dispatch", {"made_with": made_with(), "children": CHILDREN, "rows": rows})
    _print(rows)


def _measured(options: argparse.Namespace, shards: int, done_share: float, children: int) -> dict[str, Any]:
    name = f"stoker_bench_{uuid4().hex[:8]}"
    url = make_url(options.postgres)
    with psycopg.connect(libpq_url(url.set(database="postgres")), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        database = Database(libpq_url(url.set(database=name)))
        try:
            migrate(database)
            found = _row_of(database, options.redis, shards=shards, done_share=done_share, children=children)
            Console(stderr=True).print(found)
            return found
        finally:
            database.close()
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _row_of(database: Database, redis_url: str, *, shards: int, done_share: float, children: int) -> dict[str, Any]:
    big = _store(database, "big", shards=shards)
    board = PresenceBoard(redis_url)
    board.announce(WorkerPresence(name="bench", children=children, models=["m"], engine="none", healthy=True))
    dispatcher = Dispatcher(database, CountingBroker(), board, Settings.model_construct())
    dispatcher.tick()
    _finish_first(database, big, count=int(shards * done_share))
    fills = [_timed(dispatcher.fill_window, lambda: _claim_some(database, children=children)) for _ in range(TICKS)]
    sweeps = [_timed(dispatcher.sweep, lambda: None) for _ in range(20)]
    small = _store(database, "small", shards=2)
    dispatcher.fill_window()
    ahead = 0
    waits = []
    with database.transaction() as session:
        while taken := claim_next(session, holder="bench", lease_s=30.0):
            if taken.batch_id == small:
                waits.append(ahead)
            ahead += 1
    board.withdraw("bench")
    board.close()
    return {
        "shards": shards,
        "done_share": done_share,
        "children": children,
        "fill_ms_median": round(statistics.median(fills) * 1000, 2),
        "fill_ms_p99": round(sorted(fills)[int(len(fills) * 0.99)] * 1000, 2),
        "sweep_ms_median": round(statistics.median(sweeps) * 1000, 2),
        "claims_before_the_newcomers_shards": waits,
    }


def _store(database: Database, tenant: str, *, shards: int) -> UUID:
    batch_id = uuid7()
    with database.transaction() as session:
        session.execute(
            text("""
            INSERT INTO batches (id, tenant, state, endpoint, input_name, input_digest, submit_digest, options,
                total, shards_left, expires_at)
            VALUES (:id, :tenant, 'in_progress', '/v1/chat/completions', 'bench', '', '', '{}', :jobs, :shards,
                clock_timestamp() + interval '1 day')"""),
            {"id": batch_id, "tenant": tenant, "shards": shards, "jobs": shards * 64},
        )
        session.execute(
            text("""
            INSERT INTO shards (batch_id, seqs, tokens)
            SELECT :id, ARRAY(SELECT generate_series(s * 64, s * 64 + 63)), 64 * 300
            FROM generate_series(0, :shards - 1) s ORDER BY s"""),
            {"id": batch_id, "shards": shards},
        )
    with database.connection(autocommit=True) as connection:
        connection.execute("ANALYZE shards")
    return batch_id


def _finish_first(database: Database, batch_id: UUID, *, count: int) -> None:
    """As after a long run: the first shards are done, their index entries dead."""
    with database.transaction() as session:
        session.execute(
            text("""
            WITH first AS (SELECT id FROM shards WHERE batch_id = :id ORDER BY id LIMIT :count), ended AS (
                UPDATE shards s SET state = 'done', done = 64 FROM first WHERE s.id = first.id RETURNING s.id)
            UPDATE batches SET cursor = greatest(cursor, (SELECT coalesce(max(id), 0) FROM ended)) WHERE id = :id"""),
            {"id": batch_id, "count": count},
        )


def _claim_some(database: Database, *, children: int) -> None:
    """Two children end their shards and claim the next; as many run as there are children."""
    with database.transaction() as session:
        session.execute(
            text("""
            UPDATE shards SET state = 'done', done = 64 WHERE id IN (
                SELECT id FROM shards WHERE state = 'running' ORDER BY id LIMIT greatest(0, :surplus + (
                    SELECT count(*) FROM shards WHERE state = 'running')))"""),
            {"surplus": 2 - children},
        )
        for _ in range(2):
            claim_next(session, holder="bench", lease_s=600.0)


def _timed(step: Any, before: Any) -> float:
    before()
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="the dispatch leader, one batch of so many shards")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
