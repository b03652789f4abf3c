"""The lines of a batch file, one for each row, written to a temporary file and hashed on the way."""

from __future__ import annotations

import hashlib
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

from stoker_client.errors import BadInput
from stoker_client.prompts import Template, compact, is_null, text_of
from stoker_client.stopping import Stop
from stoker_client.tables import Table

ENDPOINT: Final = "/v1/chat/completions"
ROW: Final = "row-"  # before a row's number in its custom_id
SHOWN_ROWS: Final = 5
CHECK_ROWS: Final = 1000  # between two looks at whether anybody still waits


@dataclass(frozen=True, slots=True)
class Lines:
    """A batch file. `skipped`: (row, column that is null), of the rows that have no line, in order."""

    file: IO[bytes]
    count: int
    digest: str
    skipped: tuple[tuple[int, str], ...] = ()

    def line_of(self, row: int) -> int:
        """The line that a row stands in; both count from 1."""
        return row - bisect_right(self.skipped, row, key=lambda one: one[0])

    def row_of(self, line: int) -> int:
        """The row that stands in a line; both count from 1."""
        row = line
        for skipped, _ in self.skipped:
            if skipped > row:
                break
            row += 1
        return row


@dataclass(frozen=True, slots=True)
class LineForm:
    """What all lines share. `body`: the request but its messages. `states`: each line names its variables."""

    body: dict[str, Any]
    system: str | None = None
    template: Template | None = None
    states_variables: bool = False


@dataclass(slots=True)
class _Nulls:
    """How many values of each column are missing, and in which rows first."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, column: str, row: int) -> None:
        self.counts[column] = self.counts.get(column, 0) + 1
        first = self.rows.setdefault(column, [])
        if len(first) < SHOWN_ROWS:
            first.append(row)

    def __str__(self) -> str:
        return "; ".join(
            f"{column} is null in {count:,} {'row' if count == 1 else 'rows'} ({_listed(self.rows[column], count)})"
            for column, count in self.counts.items()
        )


def columns_of(template: Template | None) -> tuple[str, ...]:
    """The columns whose values lines are made of; of bare texts, whatever they are called."""
    return ("text",) if template is None else template.slots


def check_rows(table: Table, template: Template | None, *, skip_nulls: bool) -> tuple[tuple[int, str], ...]:
    """The rows to leave out, with a column of each that is null.

    Raises BadInput for nulls that are not to be skipped, for a value that has no text, and if no row is left.
    """
    columns = columns_of(template)
    nulls, skipped = _Nulls(), []
    for row, values in enumerate(table.values(columns), 1):
        missing = None
        for column, value in zip(columns, values, strict=True):
            if is_null(value):
                nulls.add(column, row)
                missing = missing or column
            else:
                _check_value(value, column, row)
        if missing is not None:
            skipped.append((row, missing))
    if skipped and not skip_nulls:
        raise BadInput(f"rows: {nulls}; fill or drop them, or pass skip_nulls=True, which leaves those rows out")
    if len(skipped) == table.count:
        raise BadInput(f"rows: none is left to run: {nulls}; fill them")
    return tuple(skipped)


def write_lines(table: Table, form: LineForm, *, skipped: tuple[tuple[int, str], ...], stop: Stop) -> Lines:
    """The batch file of a table whose rows were checked. The caller closes its file."""
    columns = columns_of(form.template)
    head, tail = _around(form)
    left_out = {row for row, _ in skipped}
    file: IO[bytes] = tempfile.TemporaryFile(prefix="stoker-", suffix=".jsonl")  # noqa: SIM115  # it is the caller's
    digest = hashlib.sha256()
    try:
        for row, values in enumerate(table.values(columns), 1):
            if row in left_out:
                continue
            texts = [text_of(value) for value in values]
            prompt = texts[0] if form.template is None else form.template.fill(texts)
            stated = _stated(form, columns, texts) if form.states_variables else ""
            line = f'{{"custom_id":"{ROW}{row}"{head}{compact(prompt)}{tail}{stated}}}\n'.encode()
            digest.update(line)
            file.write(line)
            if row % CHECK_ROWS == 0:
                stop.check()
    except BaseException:
        file.close()
        raise
    return Lines(file, table.count - len(skipped), digest.hexdigest(), skipped)


def _around(form: LineForm) -> tuple[str, str]:
    """What stands before and after the prompt in every line."""
    system = "" if form.system is None else f'{{"role":"system","content":{compact(form.system)}}},'
    model = {"model": form.body["model"]}
    rest = {name: value for name, value in form.body.items() if name != "model"}
    before = f',"method":"POST","url":"{ENDPOINT}","body":{compact(model)[:-1]},"messages":[{system}'
    return before + '{"role":"user","content":', "}]" + (f",{compact(rest)[1:]}" if rest else "}")


def _stated(form: LineForm, columns: Sequence[str], texts: Sequence[str]) -> str:
    """What a line states for the semantic cache: nothing where rows are prompts, or where a value holds a NUL."""
    if form.template is None or any("\0" in text for text in texts):
        return ""
    return f',"stoker":{compact({"variables": dict(zip(columns, texts, strict=True))})}'


def _check_value(value: Any, column: str, row: int) -> None:
    """Raises BadInput for a value that has no text, or one that no encoding takes."""
    try:
        text = text_of(value)
        if not text.isascii():
            text.encode()
    except TypeError as error:
        raise BadInput(f"rows: {column} of row {row} is a {error}, which has no text; make it a string") from error
    except UnicodeEncodeError as error:
        raise BadInput(
            f"rows: {column} of row {row} has half of a surrogate pair, which is no text; replace it"
        ) from error


def _listed(rows: Sequence[int], count: int) -> str:
    return ", ".join(map(str, rows)) + (", …" if count > len(rows) else "")
