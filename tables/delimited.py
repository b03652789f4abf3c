"""CSV and TSV files: every cell is text as it stands in the file, an unquoted empty one is null; nothing is guessed."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.csv as pc

from runtime.errors import BadInput

# A cell may span two blocks: the first size keeps memory small, the second is taken where a cell is longer than that.
BLOCK_BYTES: Final = (1 << 20, 1 << 26)
TAIL_BYTES: Final = 64
MOST_COLUMNS: Final = 10_000  # chosen: pyarrow takes 4 KB for each, and a file with more has another delimiter
SHOWN_CHARS: Final = 80


def delimited_schema(file: Path, *, delimiter: str) -> tuple[pa.Schema, int]:
    """Schema and rows; the whole file is read once, so that a bad row is found before anything is run."""
    names = _header(file, delimiter=delimiter)
    rows = 0
    last: pa.RecordBatch | None = None
    for batch in delimited_batches(file, names, delimiter=delimiter):
        rows += batch.num_rows
        last = batch if batch.num_rows else last
    if last is not None:
        _check_closed(file, last.column(len(names) - 1)[-1].as_py(), delimiter=delimiter)
    return pa.schema([(name, pa.string()) for name in names]), rows


def delimited_batches(file: Path, names: Sequence[str], *, delimiter: str) -> Iterator[pa.RecordBatch]:
    """Batches of the columns `names`, one a block. Raises BadInput that names the row."""
    given = 0
    for block_bytes in BLOCK_BYTES:
        try:
            again = given
            for batch in _stream(file, names, delimiter=delimiter, block_bytes=block_bytes):
                new = batch.slice(min(again, batch.num_rows))
                again -= batch.num_rows - new.num_rows
                given += new.num_rows
                yield new
            return
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or block_bytes == BLOCK_BYTES[-1]:
                raise _worded(file, str(error), given=given) from error


def _stream(file: Path, names: Sequence[str], *, delimiter: str, block_bytes: int) -> Iterator[pa.RecordBatch]:
    reader = pc.open_csv(
        str(file),
        read_options=pc.ReadOptions(use_threads=False, block_size=block_bytes),
        parse_options=pc.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pc.ConvertOptions(
            column_types={name: pa.string() for name in names},
            include_columns=list(names),
            include_missing_columns=True,  # another file of the folder has them
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    with reader:
        yield from reader


def _header(file: Path, *, delimiter: str) -> list[str]:
    """The names of the columns. Raises BadInput for a file without one, or with one name twice."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        try:
            names = next((row for row in csv.reader(opened, delimiter=delimiter) if row), [])
        except UnicodeDecodeError as error:
            raise _not_utf8(file) from error
        except csv.Error as error:
            raise BadInput(
                f"{file}: its header cannot be read ({error}); the first row must name the columns"
            ) from error
    if not names:
        raise BadInput(f"{file}: is empty; the first row must name the columns")
    if len(names) > MOST_COLUMNS:
        raise BadInput(f"{file}: its header has {len(names):,} columns; give a table of at most {MOST_COLUMNS:,}")
    return names


def _worded(file: Path, error: str, *, given: int) -> BadInput:
    if "invalid UTF8" in error:
        return _not_utf8(file)
    if "straddling" in error:
        return BadInput(
            f"{file}: after row {given} a quote is not closed, or a cell is longer than {BLOCK_BYTES[-1] >> 20} MB; "
            'a quote inside a quoted cell is written ""'
        )
    ragged = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", error, re.DOTALL)
    if ragged is None:
        return BadInput(f"{file}: cannot be read after row {given}: {error.splitlines()[0]}")
    row, expected, got, cells = ragged.groups()
    return BadInput(  # pyarrow counts the header as row 1
        f"{file}: row {int(row) - 1} has {got} cells, the header {expected}: {_shown(cells)!r}; "
        "put a cell that holds the delimiter or a newline in double quotes"
    )


def _not_utf8(file: Path) -> BadInput:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return BadInput(
                    f"{file}: line {number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8 "
                    f"(`iconv -f WINDOWS-1252 -t UTF-8 {file.name}`)"
                )
    return BadInput(f"{file}: is not UTF-8; save it as UTF-8")


def _check_closed(file: Path, last_cell: str | None, *, delimiter: str) -> None:
    """Raises BadInput if the last cell must have been quoted and no quote ends the file: it holds all rows after it."""
    if last_cell is None or not any(character in last_cell for character in (delimiter, "\n", "\r")):
        return
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL_BYTES))
        tail = opened.read()
    if not tail.rstrip(b"\r\n").endswith(b'"'):
        raise BadInput(
            f"{file}: a quote is not closed before the end of the file, in the cell that begins {_shown(last_cell)!r}; "
            'a quote inside a quoted cell is written ""'
        )


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
