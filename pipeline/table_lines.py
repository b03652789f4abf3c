"""A table's rows as lines of a batch file: a prompt with the row's values in its slots, one line a row.

Rows are read a batch at a time and written as they come. It must not store anything, and it keeps no row but a sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import IO, Any, Final
from uuid import UUID

import msgspec

from cache.payload import SLOT, slots_of
from pipeline.answer_forms import AnswerForm
from runtime.errors import BadInput
from tables.reading import Batch, Table

NAMED_ROWS: Final = 5
ROW: Final = "row-"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What every row is asked. `template` has slots, `{column}`; other braces are text, and so is all of `system`."""

    template: str
    system: str | None = None
    form: AnswerForm | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """The columns that it needs, each once, in their order."""
        return slots_of(self.template)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What stands before a row's own message: the system's, with how to answer."""
        told = "\n\n".join(filter(None, (self.system, self.form.instruction if self.form else None)))
        return [{"role": "system", "content": told}] if told else []

    def check(self, columns: Sequence[str]) -> None:
        """Raises BadInput unless the table has what the slots name."""
        for name, text in (("--prompt", self.template), ("--system", self.system or "")):
            if text.encode(errors="ignore").decode() != text:
                raise BadInput(f"{name}: is no valid UTF-8; write it as text")
        known = f"the table has {', '.join(columns)}"
        if len(columns) == 1 and (mark := next((one for one in ";|\t" if one in columns[0]), None)):
            known += f" (it seems to be separated by {mark!r}: write it with commas, or as .tsv with tabs)"
        elif unusual := [name for name in columns if not SLOT.fullmatch(f"{{{name}}}")]:
            known += f" (rename {', '.join(unusual)} to use it: a slot is letters, digits and _)"
        if not self.slots:
            raise BadInput(f"--prompt: has no slot; write {{column}} where a row's value stands: {known}")
        if missing := [slot for slot in self.slots if slot not in columns]:
            raise BadInput(f"--prompt: no column {', '.join(missing)}; {known}")


@dataclass(slots=True)
class Written:
    """What became of the rows. `nulls` counts them by slot, `null_rows` are the first such rows; rows count from 1.

    `sample`: lines of rows that were drawn, each as likely as any other.
    """

    rows: int = 0
    lines: int = 0
    nulls: dict[str, int] = field(default_factory=dict)
    null_rows: list[int] = field(default_factory=list)
    sample: list[bytes] = field(default_factory=list)


def write_rows(
    table: Table,
    prompt: Prompt,
    file: IO[bytes],
    *,
    model: str,
    states_variables: bool = False,
    skips_nulls: bool = False,
    sample: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Written:
    """Write a line for each row; one with a null in a slot has none.

    `states_variables`: lines say what their slots hold, as the semantic cache wants it. `on_progress` hears the rows
    that were read. Raises BadInput for nulls, unless they are to be skipped, and if no row is left.
    """
    written = Written()
    draw = random.Random()  # noqa: S311  # which rows to show
    make = _line_maker(prompt, model=model, states_variables=states_variables)
    for batch in table.batches(prompt.slots):
        lines = []
        for number, values in enumerate(_values(batch, prompt.slots), written.rows + 1):
            if any(is_null(value) for value in values):
                _note_nulls(written, number, dict(zip(prompt.slots, values, strict=True)))
                continue
            line = make(number, [_text(value, prompt.slots[at], row=number) for at, value in enumerate(values)])
            written.lines += 1
            if len(written.sample) < sample:
                written.sample.append(line)
            elif sample and (place := draw.randrange(written.lines)) < sample:
                written.sample[place] = line
            lines.append(line)
        written.rows += batch.num_rows
        file.write(b"".join(lines))
        if on_progress is not None:
            on_progress(written.rows)
    file.flush()
    _check_nulls(written, skips_nulls=skips_nulls)
    return written


def row_of(custom_id: str) -> int:
    """The number of the row, from 1, that a line was made of."""
    return int(custom_id.removeprefix(ROW))


def _values(batch: Batch, slots: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(batch.column(slot) for slot in slots), strict=True)


def _line_maker(prompt: Prompt, *, model: str, states_variables: bool) -> Callable[[int, list[str]], bytes]:
    """Makes the line of a row from its number and its values' texts: all that is the same is encoded once."""
    encode = msgspec.json.encode
    said = b"".join(encode(message) + b"," for message in prompt.messages)
    head = b'","method":"POST","url":"/v1/chat/completions","body":{"model":%b,"messages":[%b{"role":"user","content":'
    head %= (encode(model), said)
    form = b"" if prompt.form is None else b',"response_format":' + encode(prompt.form.response_format)
    tail = b'}],"temperature":0' + form + b"}"
    pieces, slots = SLOT.split(prompt.template), prompt.slots
    places = [slots.index(name) for name in pieces[1::2]]

    def make(number: int, values: list[str]) -> bytes:
        pieces[1::2] = [values[place] for place in places]
        stoker = b""
        if states_variables and not any("\0" in value for value in values):  # settings hold no NUL
            stoker = b',"stoker":{"variables":%b}' % encode(dict(zip(slots, values, strict=True)))
        return b'{"custom_id":"row-%d%b%b%b%b}\n' % (number, head, encode("".join(pieces)), tail, stoker)

    return make


def is_null(value: Any) -> bool:
    """Whether a slot has nothing to say: a null, or what pandas writes for one, NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, slot: str, *, row: int) -> str:
    """How a value stands in a prompt. Raises BadInput for what has no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal | UUID):
        return str(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if not isinstance(value, bytes | timedelta):
        with suppress(TypeError, ValueError):
            return msgspec.json.encode(value, enc_hook=str).decode()
    raise BadInput(f"{slot} of row {row} is of the type {type(value).__name__}, which has no text; make it a string")


def _note_nulls(written: Written, number: int, values: Mapping[str, Any]) -> None:
    for slot, value in values.items():
        if is_null(value):
            written.nulls[slot] = written.nulls.get(slot, 0) + 1
    if len(written.null_rows) < NAMED_ROWS:
        written.null_rows.append(number)


def _check_nulls(written: Written, *, skips_nulls: bool) -> None:
    if written.nulls and not skips_nulls:
        counts = ", ".join(f"{name} in {count:,} rows" for name, count in written.nulls.items())
        rows = ", ".join(str(row) for row in written.null_rows)
        raise BadInput(f"null: {counts} (the first: row {rows}); fill them, or leave these rows out with --skip-nulls")
    if not written.lines:
        raise BadInput("the table has no row to run")
