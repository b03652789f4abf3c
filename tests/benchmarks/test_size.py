"""How benchmarks/size.py reads Postgres's settings and plans, and what it makes of its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.size_postgres import PlanLog, server_settings
from benchmarks.size_report import COUNTED, edges

PLAN = {
    "Query Text": "SELECT 1",
    "Query Identifier": 7,
    "Plan": {
        "Node Type": "Nested Loop",
        "Actual Rows": 64,
        "Actual Loops": 1,
        "Shared Hit Blocks": 12,
        "Plans": [
            {
                "Node Type": "Index Scan",
                "Index Name": "pk_jobs",
                "Relation Name": "jobs",
                "Actual Rows": 1,
                "Actual Loops": 64,
                "Rows Removed by Filter": 3,
            }
        ],
    },
}


def test_the_benchmarks_postgres_has_the_settings_of_compose() -> None:
    settings = server_settings(explain_ms=100)
    assert settings["shared_buffers"] == "512MB"
    assert settings["max_wal_size"] == "4GB"
    assert settings["auto_explain.log_min_duration"] == "100"
    assert "fsync" not in settings
    assert "synchronous_commit" not in settings


def test_the_slowest_plan_of_a_statement_is_kept_and_half_an_entry_is_left_for_the_next_look(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(entry(120.5) + entry(310.0) + entry(99.0)[:200])
    plans = PlanLog(log)
    assert plans.read()[7]["ms"] == 310.0
    assert plans.seen == 2
    log.write_text(log.read_text() + entry(99.0)[200:] + entry(400.0) + "2026-11-29 LOG:  end\n")
    assert plans.read()[7] == {
        "ms": 400.0,
        "plan": [
            "Nested Loop: 64 rows, 1 loops, blocks 12 + 0 read",
            "  Index Scan using pk_jobs on jobs: 1 rows, 64 loops, blocks 0 + 0 read, 3 rows filtered out",
        ],
    }
    assert plans.seen == 4


def entry(took_ms: float) -> str:
    """As the server writes it."""
    plan = json.dumps(PLAN, indent=2).replace("\n", "\n\t")
    return f"2026-11-29 20:00:00.000 UTC [1] LOG:  duration: {took_ms} ms  plan:\n\t{plan}\n"


def test_the_edges_of_a_run_are_its_first_and_its_last_tenth_without_the_finishing() -> None:
    # 100 µs a job at first, 300 µs at the end; the last sample has the seconds of counting the results.
    first, last = edges([sample(at) for at in range(101)] + [sample(100) | {"at_s": 190.0}])
    assert (first["jobs"], last["jobs"]) == (90, 100)
    assert round(first["jobs_per_s"]) == 10
    assert round(last["cpu_us"] / first["cpu_us"], 1) == 3.0
    assert round(last["sweep_ms"]) == 5


def sample(at: int) -> dict[str, Any]:
    """Ten jobs a second, a sweep of 5 ms each second, and CPU by one stage alone."""
    spent = at * 0.001 if at <= 50 else 0.05 + (at - 50) * 0.003
    cpu_s = dict.fromkeys(COUNTED, 0.0) | {"postgres": spent}
    return {"at_s": float(at), "done": at * 10, "cpu_s": cpu_s, "sweeps": at, "sweep_s": at * 0.005}
