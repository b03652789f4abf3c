"""A batch's results as columns of the table that it was made of, merged in the table's order, in flat memory.

A batch of lines that failed before, a retry, is laid over the one that it repeats: the newest answer of a row counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec

from cache.payload import slots_of
from inference.replies import said
from models.states import Outcome
from pipeline.answer_forms import AnswerForm
from pipeline.table_lines import is_null, row_of
from runtime.errors import BadInput, NotFound
from store.batches import BatchProgress, batch_progress
from store.database import Database
from store.results import ResultRow, result_pages
from tables.reading import Batch, Table, open_table
from tables.writing import AddedColumn, ColumnKind, check_output, writer_for

CHAT: Final = "/v1/chat/completions"
_KINDS: Final[Mapping[str, ColumnKind]] = {
    "string": ColumnKind.TEXT,
    "integer": ColumnKind.INTEGER,
    "number": ColumnKind.NUMBER,
    "boolean": ColumnKind.BOOLEAN,
}
_TYPES: Final = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
UNFINISHED: Final = "unfinished: there is no result yet"
LOST: Final = "lost: the batch that this one repeats is kept no longer, and its answers with it"
_SAID: Final[Mapping[Outcome, str]] = {
    Outcome.TRUNCATED: "truncated: the answer was cut by its limit of tokens",
    Outcome.EMPTY: "empty: the engine said nothing",
}


@dataclass(frozen=True, slots=True)
class TableAsked:
    """What a batch keeps of the table that it was made of: enough to write that table with its answers, later too.

    `sha256` is of the table's files, `prefix` stands before the names of result columns.
    """

    path: str
    sha256: str
    template: str
    prefix: str = ""
    form: AnswerForm | None = None

    @property
    def kinds(self) -> dict[str, ColumnKind]:
        """Of the columns that the form's own fields have."""
        return {} if self.form is None else {name: _kind(schema) for name, schema in self.form.fields.items()}

    @property
    def columns(self) -> list[AddedColumn]:
        """The result columns in their order."""
        own = {
            "answer": ColumnKind.TEXT,
            **self.kinds,
            "error": ColumnKind.TEXT,
            "prompt_tokens": ColumnKind.INTEGER,
            "completion_tokens": ColumnKind.INTEGER,
            "source": ColumnKind.TEXT,
        }
        return [AddedColumn(self.prefix + name, kind) for name, kind in own.items()]

    def check(self, output: Path, table: Table) -> None:
        """Raises BadInput if the answers cannot be written there with the table's own columns."""
        taken = {"answer", "error", "prompt_tokens", "completion_tokens", "source"}
        if self.form and (twice := taken & self.form.fields.keys()):
            raise BadInput(f"--schema: its field {min(twice)} has the name of a result column; give it another")
        check_output(output, table, self.columns)

    def stored(self) -> dict[str, Any]:
        """As it stands in a batch's options; the form as text, for jsonb keeps no order of fields."""
        form = None if self.form is None else msgspec.json.encode(self.form).decode()
        return {"table": asdict(self) | {"form": form}}


def asked_of(progress: BatchProgress) -> TableAsked:
    """The table that a batch was made of, if its options have one."""
    stored = progress.options["table"]
    form = stored["form"]
    return TableAsked(**{**stored, "form": None if form is None else msgspec.json.decode(form, type=AnswerForm)})


def open_asked(asked: TableAsked, path: Path | None = None) -> Table:
    """The table of a batch, where it was or at `path`. Raises BadInput if it is not as it was."""
    table = open_table(path or Path(asked.path))
    if table.digest() != asked.sha256:
        raise BadInput(
            f"{path or asked.path}: has changed since the batch was made of it, so its rows may be others; "
            "name a copy from then with --table, or take the lines: `stoker results BATCH > lines.jsonl`"
        )
    return table


def write_table(
    database: Database,
    progress: BatchProgress,
    table: Table,
    output: Path,
    *,
    asked: TableAsked,
    tenant: str,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the table with the batch's results by now; `on_progress` hears the rows that are written."""
    repeated = list(_repeated(database, progress, tenant=tenant))
    layers = [_Answers(database, batch_id) for batch_id in repeated if batch_id is not None]
    missing = UNFINISHED if None not in repeated else LOST
    slots, columns, kinds, rows = slots_of(asked.template), asked.columns, asked.kinds, 0
    with writer_for(output, table, columns) as writer:
        for batch in table.batches():
            first, rows = rows + 1, rows + batch.num_rows
            found: dict[int, ResultRow] = {}
            for layer in reversed(layers):
                found |= layer.upto(rows)
            cells = [_cells(found.get(row), asked, kinds, missing=missing) for row in range(first, rows + 1)]
            for row, slot in _without_line(batch, slots, first=first, found=found):
                cells[row - first][asked.prefix + "error"] = f"null: the column {slot} has no value in this row"
            writer.write(batch, {one.name: [cell.get(one.name) for cell in cells] for one in columns})
            if on_progress is not None:
                on_progress(rows)
        table.check_unchanged()  # before the output takes its place


class _Answers:
    """The finished rows of one batch, read in their order."""

    def __init__(self, database: Database, batch_id: UUID) -> None:
        self._pages = result_pages(database, batch_id)
        self._read: deque[tuple[int, ResultRow]] = deque()
        self._is_over = False

    def upto(self, last: int) -> dict[int, ResultRow]:
        """The rows after those of the last call, up to this one; what is beyond it stays for the next."""
        while not self._is_over and not (self._read and self._read[-1][0] > last):
            page = next(self._pages, None)
            self._is_over = page is None
            self._read.extend((row_of(one.custom_id), one) for one in page or ())
        found = {}
        while self._read and self._read[0][0] <= last:
            row, one = self._read.popleft()
            found[row] = one
        return found


def _repeated(database: Database, progress: BatchProgress, *, tenant: str) -> Iterator[UUID | None]:
    """The batch, the one whose failed lines it runs again, and so on; None in the end for one that is kept no more."""
    earlier: UUID | None = progress.id
    while earlier is not None:
        try:
            with database.transaction() as session:
                found = batch_progress(session, earlier, tenant=tenant)
        except NotFound:
            yield None
            return
        yield earlier
        earlier = found.retry_of


def _cells(
    row: ResultRow | None, asked: TableAsked, kinds: Mapping[str, ColumnKind], *, missing: str
) -> dict[str, Any]:
    """The result columns of one row by their names; those that have no value are left out."""
    if row is None:
        return {asked.prefix + "error": missing}
    found: dict[str, Any] = {"source": row.source}
    if row.outcome is Outcome.FAILED:
        found["error"] = " ".join(f"{row.error_code}: {row.error_message}".split())  # a CSV's row is a line
    else:
        found["error"] = _SAID.get(row.outcome)
        text = said(CHAT, row.response or "").text
        answer, fields = (text, {}) if asked.form is None else asked.form.read(text)
        found |= {"answer": answer} | {name: _cell(fields.get(name), kind) for name, kind in kinds.items()}
    found |= {"prompt_tokens": row.prompt_tokens, "completion_tokens": row.completion_tokens}
    return {asked.prefix + name: value for name, value in found.items()}


def _without_line(
    batch: Batch, slots: Sequence[str], *, first: int, found: Mapping[int, ResultRow]
) -> Iterator[tuple[int, str]]:
    """(row, slot) of the rows that have no result, as their slot has no value."""
    if len(found) == batch.num_rows:
        return
    for slot in slots:
        for row, value in enumerate(batch.column(slot), first):
            if is_null(value) and row not in found:
                yield row, slot


def _kind(schema: Any) -> ColumnKind:
    """What holds a property's values: JSON text for what has no column of its own, or may be of several types."""
    found = _types(schema) - {"null"}
    if found == {"integer", "number"}:
        return ColumnKind.NUMBER
    return _KINDS.get(min(found), ColumnKind.TEXT) if len(found) == 1 else ColumnKind.TEXT


def _types(schema: Any) -> set[str]:
    """The JSON types that a value may have, as far as its schema says; references say nothing."""
    if not isinstance(schema, dict):
        return {"any"}
    if stated := schema.get("type"):
        return {stated} if isinstance(stated, str) else set(stated)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return {kind for choice in choices for kind in _types(choice)}
    values = schema.get("enum") or [schema[name] for name in ("const",) if name in schema]
    return {_TYPES.get(type(value), "any") for value in values} or {"any"}


def _cell(value: Any, kind: ColumnKind) -> Any:
    """A field's value as its column takes it; what that cannot hold becomes null there."""
    if value is None or isinstance(value, str) or kind is not ColumnKind.TEXT:
        return value
    return msgspec.json.encode(value).decode()
