"""SQL text is composed of constants only: what is put into an f-string in store/ is one, or was read and stands here.

Ruff's S608, which is off, can only say that there is an f-string.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "store").glob("*.py"))
SQL = {"SELECT", "UPDATE", "DELETE", "INSERT", "WHERE", "FROM", "SET", "LOCK", "DROP", "CREATE", "EXISTS", "VALUES"}
# Of a function's own text, or given by callers in the same file, each with text that stands there.
READ = {
    "batches": {"older", "', '.join("},
    "budget_tables": {
        "self.name",
        "self.day",
        "self.month",
        "self.of_key",
        "self.rows_of_key",
        "key",
        "of_key",
        "of_batch",
    },
    "cache_reports": {"condition"},
    "documents": {"condition"},
    "engines": {"adapters"},
    "files": {"condition", "order"},
    "retention": {"table", "key", "_GONE.get(table, '')", "name"},  # name: a partition's, from Postgres's own catalogue
    "schedules": {"sets", "unchanged", "on_conflict", "_BATCH_IS_LIVE.format("},
    "schema": {"name", "table", "bounds", "uuid7_floor("},  # a partition's name, and moments of ours
    "shards": {"engine", "worker", "but", "condition", "place", "_reserved('s.engine', 's.worker', but='s.id')"},
    "submissions": {"span"},
    "written": {"returned", "saved", "followers", "total", "answer"},
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_no_value_is_written_into_sql(file: Path) -> None:
    read = READ.get(file.stem, set())
    for line, placeholder in placeholders(file.read_text()):
        said = f"{file.name}:{line}: pass {placeholder} as a parameter, or read where it comes from and say so here"
        assert any(placeholder == one or (one.endswith("(") and placeholder.startswith(one)) for one in read), said


def test_a_value_in_sql_is_seen() -> None:
    bad = 'def find(session, tenant):\n    session.execute(text(f"SELECT 1 WHERE {_LIVING} AND t = {tenant}"))'
    assert list(placeholders(bad)) == [(2, "tenant")]


def placeholders(source: str) -> Iterator[tuple[int, str]]:
    """The line and text of every placeholder in SQL that is no constant of its module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        if SQL & set(" ".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)).split()):
            for part in node.values:
                if isinstance(part, ast.FormattedValue) and not is_constant(part.value):
                    yield node.lineno, ast.unparse(part.value)


def is_constant(node: ast.expr) -> bool:
    """A name in capitals, also of another module or object, or one of two texts."""
    if isinstance(node, ast.IfExp):
        return isinstance(node.body, ast.Constant) and isinstance(node.orelse, ast.Constant)
    name = node.id if isinstance(node, ast.Name) else ast.unparse(node).partition(".")[0]
    return isinstance(node, ast.Name | ast.Attribute) and name.lstrip("_").isupper()
