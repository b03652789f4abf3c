"""JSONL files: one object a line. A first pass finds the type of every field, a second one reads by these types.

Text stays text: what looks like a date is no date here.
"""

from __future__ import annotations

import io
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from runtime.errors import BadInput
from tables.schemas import Unlike, merged

BLOCK_BYTES: Final = 1 << 20  # as pyarrow's own readers take; a line may be longer
BOM: Final = b"\xef\xbb\xbf"
# pyarrow makes a float of an integer beyond 64 bits without a word.
LONG_INTEGER: Final = re.compile(rb"[:,\[]\s*-?\d{19}")
LARGEST_INTEGER: Final = (1 << 63) - 1
MOST_DIGITS: Final = 40  # of one that is too large, in what is said of it


def lines_schema(file: Path) -> tuple[pa.Schema, int]:
    """Schema and rows of the whole file. Raises BadInput that names the line and what is wrong with it."""
    schema = pa.schema([])
    rows = 0
    for first_line, block in _blocks(file):
        schema, found = _extended(file, first_line, block, known=schema)
        rows += found
    return schema, rows


def lines_batches(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of the fields of `schema`; other fields are left out."""
    options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    for _, block in _blocks(file):
        yield from _table(block, options).to_batches()


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines, about BLOCK_BYTES of them at a time, and the number of the first, counted from 1."""
    first_line = 1
    pieces: list[bytes] = []
    with file.open("rb") as opened:
        if opened.read(len(BOM)) != BOM:
            opened.seek(0)
        while piece := opened.read(BLOCK_BYTES):
            end = piece.rfind(b"\n") + 1
            if end:
                block = b"".join([*pieces, piece[:end]])
                yield first_line, block
                first_line += block.count(b"\n")
                pieces = [piece[end:]]
            else:
                pieces.append(piece)
    if rest := b"".join(pieces):
        yield first_line, rest


def _table(block: bytes, options: pj.ParseOptions | None = None) -> pa.Table:
    reading = pj.ReadOptions(use_threads=False, block_size=len(block) + 1)
    return pj.read_json(io.BytesIO(block), read_options=reading, parse_options=options)


def _extended(file: Path, first_line: int, block: bytes, *, known: pa.Schema) -> tuple[pa.Schema, int]:
    """`known` with what the block has more, and its rows. Raises BadInput that names the line."""
    try:
        if not block.isascii():
            block.decode()
        table = _objects(block)
        schema = _with(known, table.schema)
    except UnicodeDecodeError as error:
        line = first_line + block.count(b"\n", 0, error.start)
        raise BadInput(
            f"{file}: line {line} is not UTF-8 (byte 0x{block[error.start]:02x}); write it as UTF-8"
        ) from error
    except (pa.ArrowException, Unlike) as error:
        raise _first_bad_line(file, first_line, block, known=known) from error
    if any(_beyond_64_bits(chunk) for column in table.columns for chunk in column.chunks):
        _check_integers(file, first_line, block)
    return schema, table.num_rows


def _objects(block: bytes) -> pa.Table:
    """As _table, of lines whose types are not known yet. Raises ArrowInvalid unless each is one object or blank.

    Where each begins and ends as an object, none goes on in the next; so as many rows as lines are one a line. pyarrow
    makes a row of a null, and where one comes first in a block it ends the process (26.0.1, SIGSEGV).
    """
    lines = _lines_in(block)
    if lines is None or (table := _table(block)).num_rows != lines:
        raise pa.ArrowInvalid("not one object a line")
    return table


def _lines_in(block: bytes) -> int | None:
    """How many are not blank; None where one does not begin and end as an object."""
    text = block.strip()
    breaks = text.count(b"\n")
    if text[:1] + text[-1:] == b"{}" and text.count(b"}\n{") + text.count(b"}\r\n{") == breaks:  # most files
        return breaks + 1
    lines = [line for line in map(bytes.strip, text.split(b"\n")) if line]
    return len(lines) if all(line[:1] + line[-1:] == b"{}" for line in lines) else None


def _with(known: pa.Schema, found: pa.Schema) -> pa.Schema:
    if found.equals(known):
        return known
    fields = [field.with_type(_without_times(field.type)) for field in found]
    return merged(known, pa.schema(fields))


def _without_times(type_: pa.DataType) -> pa.DataType:
    """The type with text in place of the times that pyarrow sees in it."""
    if pa.types.is_timestamp(type_):
        return pa.string()
    if isinstance(type_, pa.ListType):
        return pa.list_(_without_times(type_.value_type))
    if isinstance(type_, pa.StructType):
        return pa.struct([field.with_type(_without_times(field.type)) for field in type_])
    return type_


def _first_bad_line(file: Path, first_line: int, block: bytes, *, known: pa.Schema) -> BadInput:
    """What is wrong with the first line that is no object of the types of all before it."""
    lines = block.split(b"\n")
    good = bisect_left(range(len(lines)), True, key=lambda count: not _fits(lines[: count + 1], known=known))
    if good == len(lines):
        return BadInput(f"{file}: lines {first_line} and after are not one JSON object a line")
    place = f"{file}: line {first_line + good}"
    try:
        if not isinstance(json.loads(lines[good]), dict):
            return BadInput(f"{place} is no JSON object{_remedy(lines[good])}")
        _with(_with(known, _table(b"\n".join(lines[:good]) + b"\n").schema), _table(lines[good]).schema)
    except Unlike as error:
        return BadInput(f"{place}: {_of_two_types(error)}")
    except pa.ArrowException as error:
        return BadInput(f"{place}: {_worded(str(error))}")
    except (ValueError, RecursionError) as error:  # also of a number with more digits than Python reads
        return BadInput(f"{place} is no JSON ({error}){_remedy(lines[good])}")
    return BadInput(f"{place}: does not go with the lines before it")


def _fits(lines: list[bytes], *, known: pa.Schema) -> bool:
    """Whether each line is one object, of the same types as the others and as `known`."""
    try:
        _with(known, _objects(b"\n".join(lines)).schema)
    except (pa.ArrowException, Unlike):
        return False
    return True


def _shown(digits: str) -> str:
    return digits if len(digits) <= MOST_DIGITS else f"{digits[:MOST_DIGITS]}… of {len(digits):,} digits"


def _remedy(line: bytes) -> str:
    if line.lstrip().startswith(b"["):
        return "; a file that is one JSON array becomes lines with `jq -c '.[]'`"
    return "; write one object a line"


def _worded(error: str) -> str:
    twice = re.search(r"Column\((.*)\) was specified twice", error)
    if twice is not None:
        return f"the field {twice[1].strip('/')} stands twice in it; give it one name each"
    within = re.search(r"Column\((.*)\) changed from (\w+) to (\w+)", error)
    if within is not None:
        field = within[1].strip("/").removesuffix("/[]")
        return f"the list in field {field} holds a {within[2]} and a {within[3]}; give it one type"
    return error.splitlines()[0].removeprefix("JSON parse error: ").removesuffix(" in row 0")


def _of_two_types(unlike: Unlike) -> str:
    before, here = _word(unlike.before), _word(unlike.here)
    if before == here:
        before, here = unlike.before, unlike.here
    return f"the field {unlike.column} is {here} here and {before} in a line before; give it one type in every line"


def _word(type_: str) -> str:
    words = {"string": "text", "int64": "a number", "double": "a number", "bool": "a boolean"}
    if type_.startswith("list<"):
        return "a list"
    return "an object" if type_.startswith("struct<") else words.get(type_, type_)


def _beyond_64_bits(array: Any) -> bool:
    """Whether a float is in it, at any depth, that may have been such an integer."""
    if isinstance(array, pa.ListArray):
        return _beyond_64_bits(array.flatten())
    if isinstance(array, pa.StructArray):
        return any(_beyond_64_bits(within) for within in array.flatten())
    if not pa.types.is_floating(array.type):
        return False
    ends = pc.min_max(array)
    return any((end.as_py() or 0) * sign >= LARGEST_INTEGER for end, sign in ((ends["min"], -1), (ends["max"], 1)))


def _check_integers(file: Path, first_line: int, block: bytes) -> None:
    """Raises BadInput for an integer that no column of a table can hold."""

    def within_64_bits(digits: str) -> int:
        if len(digits) > len(str(LARGEST_INTEGER)) + 1 or abs(int(digits)) > LARGEST_INTEGER:
            raise OverflowError(digits)
        return int(digits)

    for number, line in enumerate(block.split(b"\n"), start=first_line):
        if LONG_INTEGER.search(line):
            try:
                json.loads(line, parse_int=within_64_bits)
            except OverflowError as error:
                raise BadInput(
                    f"{file}: line {number}: the integer {_shown(str(error))} does not fit in 64 bits; "
                    "write it as text in quotes"
                ) from error
