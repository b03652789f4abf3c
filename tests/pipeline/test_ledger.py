"""What reports of costs are made of: rows of batches, engines and keys that really are there."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from models.endpoints import NANOS
from pipeline.costs import Group, cost_report
from pipeline.ledger import ledger_of_batch, ledger_since
from runtime.clock import utc_now
from runtime.settings import CostSettings
from store.database import Database
from store.engine_days import EngineTime, add_engine_time
from store.engines import register_engine
from store.shards import write_results
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, execute, store_batch

COST = CostSettings()


def run_batch(database: Database, folder: Path, *, jobs: int, tenant: str = "local") -> tuple[UUID, int, int]:
    """A batch whose first job a priced endpoint answered for 9 nanos, the others the own engine: it and both ids."""
    batch_id = store_batch(database, folder, chats(jobs), tenant=tenant)
    claim = claimed(database, dispatch_all(database)[0])
    with database.transaction() as session:
        own = register_engine(session, {"kind": "vllm", "checkpoint": "qwen"})
        priced = register_engine(session, {"kind": "endpoint", "name": "cloud", "trust": "external"})
        first, *others = answers(claim.seqs)
        results = [replace(first, engine_id=priced, cost=9), *others]
        write_results(session, claim, results, engine_id=own, lease_s=LEASE_S)
    return batch_id, own, priced


def test_a_batch_is_told_by_endpoint_with_its_part_of_the_engine(database: Database, tmp_path: Path) -> None:
    batch_id, own, _ = run_batch(database, tmp_path, jobs=4)
    run_batch(database, tmp_path, jobs=7)
    with database.transaction() as session:
        add_engine_time(session, own, EngineTime(up_s=3600.0), cost=9000, is_shared=False)
    with database.transaction() as session:
        report = cost_report(ledger_of_batch(session, batch_id), by=Group.ENDPOINT, cost=COST)
    found = {line.name: (line.jobs, line.prompt_tokens, line.billed, line.own) for line in report.lines}
    assert found == {"vllm qwen": (3, 9, 0, 3000), "cloud": (1, 3, 9, 0)}
    assert [use.hours for use in report.engines] == [1.0]


def test_a_tenant_is_told_of_its_own_only_and_of_no_idle_engine(database: Database, tmp_path: Path) -> None:
    _, own, _ = run_batch(database, tmp_path, jobs=2)
    run_batch(database, tmp_path, jobs=4, tenant="acme")
    today = utc_now().date()
    with database.transaction() as session:
        add_engine_time(session, own, EngineTime(up_s=60.0), cost=8 * NANOS, is_shared=False)
        add_engine_time(session, own + 100, EngineTime(up_s=60.0), cost=NANOS, is_shared=False)
        theirs = cost_report(ledger_since(session, today, tenant="acme"), by=Group.BATCH, cost=COST)
        everything = cost_report(ledger_since(session, today, tenant=None), by=Group.KEY, cost=COST)
    assert [(line.jobs, line.own) for line in theirs.lines] == [(4, 6 * NANOS)]
    assert {line.name: line.own for line in everything.lines} == {
        "local: no key": 2 * NANOS,
        "acme: no key": 6 * NANOS,
        "(no jobs)": NANOS,
    }


def test_a_batch_that_is_gone_is_still_told_of(database: Database, tmp_path: Path) -> None:
    batch_id, _, _ = run_batch(database, tmp_path, jobs=2)
    execute(database, "DELETE FROM batches WHERE id = :id", id=batch_id)
    with database.transaction() as session:
        yesterday = utc_now().date() - timedelta(days=1)
        report = cost_report(ledger_since(session, yesterday, tenant=None), by=Group.BATCH, cost=COST)
    assert [(line.name, line.jobs) for line in report.lines] == [(f"batch_{batch_id.hex}", 2)]
