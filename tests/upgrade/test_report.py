"""What counts an upgrade finds what it must, and the document says what was kept."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from store.database import Database
from tests.support.batches import rows
from tests.support.waiting import wait_until
from tests.upgrade.figures import errors_in, faults_in, postgres_lines
from tests.upgrade.report import DOCUMENT, KEPT, document
from tests.upgrade.waits import LOOK_S, TableWaits

POSTGRES = """\
2026-11-29 20:40:00.100 UTC [41] LOG:  process 41 still waiting for AccessShareLock on relation 1
2026-11-29 20:40:00.600 UTC [41] LOG:  process 41 acquired RowExclusiveLock on relation 1 of database 5 after 512.5 ms
2026-11-29 20:40:00.610 UTC [41] DETAIL:  a detail
2026-11-29 20:40:00.700 UTC [42] LOG:  process 42 acquired ShareLock on transaction 9 after 900.0 ms
2026-11-29 20:40:01.000 UTC [43] ERROR:  column "spill" does not exist
"""


def test_errors_are_read_from_postgres_log(tmp_path: Path) -> None:
    log = tmp_path / "postgres.log"
    log.write_text(POSTGRES)
    lines = postgres_lines(log)
    began = lines[0].at
    assert errors_in(lines, since=began, until=began + 2) == {'column "spill" does not exist': 1}
    assert errors_in(lines, since=began, until=began + 0.5) == {}


def test_a_schema_that_a_process_does_not_know_is_a_fault_and_an_outage_is_none() -> None:
    known = '{"event": "claim_failed", "error": "Postgres at x lacks a column of this version: ..."}'
    assert faults_in(f'{{"event": "dispatch_waits"}}\n{known}\nTraceback (most recent call last):') == [
        known,
        "Traceback (most recent call last):",
    ]


def test_the_document_has_the_tables_of_the_kept_run() -> None:
    text = DOCUMENT.read_text()
    assert document(text, KEPT) == text


def test_who_waits_for_a_table_that_a_migration_has_is_seen(database: Database, postgres_url: str) -> None:
    began = time.time()
    with TableWaits(postgres_url) as waits, ThreadPoolExecutor(1) as pool, database.connection() as migration:
        migration.execute("LOCK TABLE batches IN ACCESS EXCLUSIVE MODE")
        waiting = pool.submit(rows, database, "SELECT count(*) FROM batches")
        wait_until(lambda: max(waits.within(began, time.time()), default=0.0) > LOOK_S, 20.0, "its wait is seen")
        migration.rollback()
        assert waiting.result(20.0) == [(0,)]
    assert len(waits.within(began, time.time())) == 1
    assert waits.within(began - 1, began) == []
