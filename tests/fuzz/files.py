"""Targets of files that users bring: tables of every kind, and documents as far as they are told apart."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.feather as pf
import pyarrow.parquet as pq

from documents.kinds import Kind, kind_of, refuse_bomb
from runtime.errors import BadInput, Permanent
from tables.reading import BATCH_ROWS, Table, open_table
from tests.fuzz.target import Target, check_text

MESSAGE_CHARACTERS: Final = 2_000
DOCUMENT_CODES: Final = frozenset(
    {"empty_document", "encrypted_document", "archive_bomb", "corrupt_document", "unsupported_document"}
)
NAMES: Final = ("a.txt", "a.csv", "a.md", "a.html", "a.pdf", "a.docx", "noext", "a.")


def kinds(data: bytes) -> None:
    """A document is of a kind that is read, or is refused in words that can be stored; an archive's parts are apart."""
    name, content = NAMES[data[0] % len(NAMES)], data[1:]
    try:
        kind, note = kind_of(content, name)
    except Permanent as error:
        assert error.code in DOCUMENT_CODES
        check_text(str(error), most=MESSAGE_CHARACTERS)
        return
    check_text(note or "", most=200)
    if kind in (Kind.DOCX, Kind.XLSX, Kind.PPTX):
        with suppress(Permanent):
            refuse_bomb(content, name, unpacked_bytes=1 << 20)


def csv_file(data: bytes) -> None:
    """A table of text: each row has a cell a column; without quotes they are what stands between the delimiters."""
    suffix, delimiter = (".csv", ",") if data[0] & 1 else (".tsv", "\t")
    content = data[1:]
    rows = _rows_of(content, suffix)
    if rows is None or b'"' in content:
        return
    plain = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    header, *lines = [line.split(delimiter) for line in plain if line]
    assert rows == [dict(zip(header, [cell or None for cell in line], strict=True)) for line in lines]


def jsonl(data: bytes) -> None:
    """A table of JSON lines: a row each, whose plain fields are what the line says."""
    rows = _rows_of(data, ".jsonl")
    if rows is None:
        return
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        for name, value in json.loads(line).items():
            if isinstance(value, str | int | bool) or value is None:
                assert row[name] == value, name


def columnar(data: bytes) -> None:
    """Parquet and Arrow: rows in number as their schema says, or refused."""
    _rows_of(data[1:], (".parquet", ".arrow")[data[0] % 2])


def _rows_of(content: bytes, suffix: str) -> list[dict[str, Any]] | None:
    """The rows of a file of such bytes; None if it is refused, which is said of the file, in a few words."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        try:
            table = open_table(Path(file.name))
            rows = _all_rows(table)
        except BadInput as error:
            assert str(error).startswith(file.name)
            assert len(str(error)) <= MESSAGE_CHARACTERS + len(file.name)
            return None
    assert len(rows) == table.rows
    return rows


def _all_rows(table: Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    names = table.column_names
    for batch in table.batches():
        assert 0 < batch.num_rows <= BATCH_ROWS
        columns = [batch.column(name) for name in names]
        assert all(len(column) == batch.num_rows for column in columns)
        rows += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def _zip(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return held.getvalue()


def _columns() -> pa.Table:
    return pa.table({"a": ["x", None], "b": [1, 2], "c": [[1.5], []], "d": [{"e": True}, None], "f": [b"\0", b""]})


def _parquet() -> bytes:
    held = io.BytesIO()
    pq.write_table(_columns(), held, compression="none", use_dictionary=False)
    return held.getvalue()


def _arrow(*, is_stream: bool) -> bytes:
    held = io.BytesIO()
    if is_stream:
        with pa.ipc.new_stream(held, _columns().schema) as stream:
            stream.write_table(_columns())
    else:
        pf.write_feather(_columns(), held, compression="uncompressed")
    return held.getvalue()


def _csv() -> bytes:
    held = io.StringIO()
    csv.writer(held).writerows([["a", "b"], ["1", 'x, "y"\nz'], ["", "é"]])
    return held.getvalue().encode()


TARGETS: Final = {
    "kinds": Target(
        "what a document is, by its bytes",
        kinds,
        (
            *(b"\5" + _zip("[Content_Types].xml", part) for part in ("word/document.xml", "xl/workbook.xml", "ppt/a")),
            *(
                b"\4%PDF-1.4\n1 0 obj\nstartxref\n9\n%%EOF",
                b"\0<!DOCTYPE html><html>",
                b"\1\xff\xfea\0,\0b\0",
                b"\2# a",
            ),
        ),
        is_json=False,
    ),
    "csv": Target(
        "CSV and TSV files",
        csv_file,
        (b"\1" + _csv(), b"\1a,b\n1,2\n3,\n", b"\0a\tb\r\n1\t2\r\n"),
        is_json=False,
        most_bytes=1 << 18,  # rows of two bytes are dicts of 180 here, which would pass for a fault of the reader
        s_per_mb=6.0,
    ),
    "jsonl": Target(
        "JSONL files",
        jsonl,
        (
            b'{"a":1,"b":"x","c":[1,2],"d":{"e":true}}\n{"a":2.5,"b":null,"f":"2026-01-01"}\n',
            b'\xef\xbb\xbf{"a":"\xc3\xa9"}\n',
            b'{"a":1}{"a":2}\n{"a":\n3}\n',  # as many objects as lines, but not one in each
        ),
        head_bytes=0,
        s_per_mb=10.0,
    ),
    "columnar": Target(
        "Parquet and Arrow files",
        columnar,
        (b"\0" + _parquet(), b"\1" + _arrow(is_stream=True), b"\1" + _arrow(is_stream=False)),
        is_json=False,
        s_per_mb=10.0,
    ),
}
