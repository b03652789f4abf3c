"""JSONL files: one object a line. A first pass finds the type of every field, a second one reads by these types.

Text stays text: what looks like a date is no date here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.json as pj

from runtime.errors import BadInput

BLOCK_BYTES: Final = 1 << 20  # as pyarrow's own readers take; a line may be longer
BOM: Final = b"\xef\xbb\xbf"
# Integers beyond 64 bits become floats without a word; only a field that became one is looked at.
LONG_INTEGER: Final = re.compile(rb"[:,\[]\s*-?\d{19}")
LARGEST_INTEGER: Final = (1 << 63) - 1


def lines_schema(file: Path) -> tuple[pa.Schema, int]:
    """Schema and rows of the whole file. Raises BadInput that names the line and what is wrong with it."""
    schema = pa.schema([])
    rows = 0
    for first_line, block in _blocks(file):
        found = _parse(file, first_line, block, known=schema)
        schema = found.schema if schema.equals(found.schema) else _unified(schema, found.schema)
        rows += found.num_rows
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
            pieces.append(piece[:end])
            if end:
                block = b"".join(pieces)
                pieces = [piece[end:]]
                yield first_line, block
                first_line += block.count(b"\n")
            else:
                pieces[-1] = piece
    if rest := b"".join(pieces):
        yield first_line, rest


def _table(block: bytes, options: pj.ParseOptions | None = None) -> pa.Table:
    reading = pj.ReadOptions(use_threads=False, block_size=len(block) + 1)
    return pj.read_json(io.BytesIO(block), read_options=reading, parse_options=options)


def _parse(file: Path, first_line: int, block: bytes, *, known: pa.Schema) -> pa.Table:
    """The rows of a block, their types in agreement with `known`. Raises BadInput that names the line."""
    try:
        if not block.isascii():
            block.decode()
        table = _table(block)
        table = table.cast(_as_text(table.schema)) if _has_times(table.schema) else table
        _unified(known, table.schema)
    except UnicodeDecodeError as error:
        line = first_line + block.count(b"\n", 0, error.start)
        raise BadInput(f"{file}: line {line} is not UTF-8 (byte 0x{block[error.start]:02x}); write it as UTF-8") from error
    except pa.ArrowException as error:
        raise _worded(file, first_line, block, known=known, error=error) from error
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if table.num_rows != lines and table.num_rows != sum(1 for line in block.split(b"\n") if line.strip()):
        raise _worded(file, first_line, block, known=known, error=ValueError("not one object a line"))
    if any(pa.types.is_floating(type_) for type_ in _types(table.schema)) and LONG_INTEGER.search(block):
        _check_integers(file, first_line, block)
    return table


def _unified(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    return pa.unify_schemas([one, other], promote_options="permissive")
