"""SQL text is composed of constants only: what is put into a text in store/ is one, or was read and stands here.

Ruff's S608, which is off, can only say that there is an f-string.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "store").glob("*.py"))
RUN = {"text", "execute", "exec_driver_sql", "scalar", "scalars", "stream_scalars"}  # what SQL is given to
BUILT = {"text", "select", "update", "delete", "insert"}  # whose values SQLAlchemy binds
# By function: of its own text, or given by callers in the same file, each with text that stands there.
READ = {
    "batches": {"name", "sum_", "', '.join("},
    "batches.batches_to_finish": {"ready"},  # a select
    "batches.finish": {"name", "sum_", "', '.join("},
    "batches.latest_batches": {"older", "newest"},
    "batches.progress_of_batches": {"condition"},
    "budget_tables._reports": {"self.of_key", "self.name", "of_key", "of_batch"},
    "budget_tables.begin": {"self.name", "self.of_key", "key"},
    "budget_tables.holds": {"self.name", "self.day", "self.month"},
    "budget_tables.ids_for": {"self.name", "self.rows_of_key"},
    "budget_tables.lock_of_key": {"self.day", "self.month", "self.rows_of_key"},
    "budget_tables.of_key": {"self.day", "self.month"},
    "budget_tables.open": {"self.name"},
    "budget_tables.rows_of_key": {"self.of_key", "self.name"},
    "budget_tables.set_caps": {"self.day", "self.month"},
    "cache_reports._forget": {"condition"},
    "costs.taken_beside": {"condition"},
    "documents._delete": {"condition"},
    "engines.checkpoints": {"adapters"},
    "files.list_files": {"beyond", "condition", "order"},
    "inspection._steps": {"self._scan", "self._look"},
    "keys._changed": {"statement"},
    "notifications.listening": {"channel"},
    "retention.delete_some": {"table", "key", "_GONE.get(table, '')"},
    "retention.drop_partition": {"table", "name"},  # a partition's, from Postgres's own catalogue
    "schedules._let_wait": {"sets"},
    "schedules._put": {"on_conflict"},
    "schedules.replace_schedule": {"name", "sets", "unchanged"},
    "schema._make_partition": {"name", "table", "bounds", "uuid7_floor("},  # a partition's name, and moments of ours
    "shards._claim_where": {"condition"},
    "shards._reserved": {"engine", "worker", "but"},
    "shards._write": {"write_of("},
    "shards.extend_leases": {"_reserved('s.engine', 's.worker', but='s.id')"},
    "shards.is_alone": {"place"},
    "submissions.insert_shards": {"span"},
    "written.write_of": {"returned", "saved", "followers", "total", "answer"},
}
# Functions whose f-strings are names and messages; what these give to RUN is looked at all the same.
NO_SQL = {
    *("again._gone", "answers.checkpoint_scope", "answers.template_scope", "batches.screen", "blobs.local_copy"),
    *(
        "blobs.place",
        "cache_reports._no_namespace",
        "database.__init__",
        "database._unreachable",
        "endpoint_limits._keys",
    ),
    *(
        "documents.made_collection",
        "endpoint_limits.take",
        "express.collect",
        "express.told",
        "revisions.schema_revisions",
    ),
    *("schema._long_transactions", "schema.migrate", "schema.partition_name", "schema.partition_start"),
    *("step_states._key", "submissions.lock_submit"),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_no_value_is_written_into_sql(file: Path) -> None:
    for place, line, value in placeholders(file.read_text(), file.stem):
        said = f"{file.name}:{line}: pass {value} as a parameter, or read where it comes from and say so here: {place}"
        assert any(value == one or (one.endswith("(") and value.startswith(one)) for one in READ.get(place, ())), said


@pytest.mark.parametrize(
    "statement",
    [
        'session.execute(text(f"SELECT 1 WHERE {_LIVING} AND t = {tenant}"))',
        'session.execute(text(f"select 1 from files where t = {tenant}"))',
        'session.execute(text(f"TRUNCATE {tenant}"))',
        'session.execute(text("SELECT 1 WHERE t = \'" + tenant + "\'"))',
        "session.execute(text(\"SELECT 1 WHERE t = '%s'\" % tenant))",
        "session.execute(text(\"SELECT 1 WHERE t = '%(t)s'\" % {'t': tenant}))",
        'session.execute(text("SELECT 1 WHERE t = {c}".format(c=tenant)))',
        "session.execute(text(_FOUND.format(tenant)))",
        "session.execute(text(tenant))",
        "connection.exec_driver_sql(_FOUND + tenant)",
        'connection.execute(f"LISTEN {tenant}")',
        'condition = f"AND t = {tenant}"',
        'condition += "AND t = " + tenant',
        'return f"AND t = {tenant}"',
    ],
)
def test_a_value_in_sql_is_seen(statement: str) -> None:
    found = list(placeholders(f"def find(session, connection, tenant):\n    {statement}", "files"))
    assert found and all(place == "files.find" and "tenant" in value for place, _, value in found)


def test_what_is_read_is_there() -> None:
    seen: dict[str, set[str]] = {}
    for file in FILES:
        for place, _, value in placeholders(file.read_text(), file.stem):
            seen.setdefault(place, set()).add(value)
    stale = {
        (place, one)
        for place, read in READ.items()
        for one in read
        if not any(value == one or (one.endswith("(") and value.startswith(one)) for value in seen.get(place, ()))
    }
    assert not stale


def placeholders(source: str, place: str) -> Iterator[tuple[str, int, str]]:
    """The function, line and text of every value in SQL that is no constant of its module."""
    for function, node in inside(ast.parse(source), place):
        if isinstance(node, ast.Call) and name_of(node.func) in RUN:
            roots: list[ast.AST] = [one for one in node.args[:1] if name_of(first(one)) not in BUILT]
        elif function in NO_SQL or not is_composed(node):
            continue
        else:
            roots = [node]
        for root in roots:
            for value in values(root):
                yield function, value.lineno, ast.unparse(value)


def inside(node: ast.AST, place: str) -> Iterator[tuple[str, ast.AST]]:
    """Every node with the function that it is in, but for what is raised."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise):
            continue
        yield place, child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from inside(child, f"{place.partition('.')[0]}.{child.name}")
        else:
            yield from inside(child, place)


def is_composed(node: ast.AST) -> bool:
    """A text that is made of others."""
    if isinstance(node, ast.BinOp):
        return any(isinstance(one, ast.JoinedStr) or is_text(one) for one in (node.left, node.right))
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and name_of(node.func) == "format")


def values(node: ast.AST) -> Iterator[ast.expr]:
    """What a text is made of that is no constant."""
    parts: list[ast.expr]
    if isinstance(node, ast.JoinedStr):
        parts = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
    elif isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Tuple):
        parts = node.elts
    elif isinstance(node, ast.IfExp):
        parts = [node.body, node.orelse]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        parts = [node.func.value, *node.args, *(keyword.value for keyword in node.keywords)]
    else:
        parts = []
        if isinstance(node, ast.expr) and not is_text(node) and not is_constant(node):
            yield node
    for part in parts:
        yield from values(part)


def is_text(node: ast.AST) -> bool:
    """A text that stands there."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_constant(node: ast.expr) -> bool:
    """A name in capitals, also of another module or object, or an element of one."""
    node = node.value if isinstance(node, ast.Subscript) else node
    name = node.id if isinstance(node, ast.Name) else ast.unparse(node).partition(".")[0]
    return isinstance(node, ast.Name | ast.Attribute) and name.lstrip("_").isupper()


def first(node: ast.expr) -> ast.expr:
    """The innermost call of a chain: `select` of `select(x).where(y)`."""
    while isinstance(node, ast.Call):
        inner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        node = inner
    return node


def name_of(node: ast.expr) -> str:
    """The last part of a name."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
