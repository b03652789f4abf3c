"""Tables as they are read: opened once for schema and rows, then walked in batches as often as wanted.

Memory stays flat whatever the size; a table is never held. Every error names the file and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from runtime.errors import BadInput
from tables.columnar import arrow_batches, arrow_schema, parquet_batches, parquet_schema
from tables.delimited import delimited_batches, delimited_schema
from tables.files import Kind, files_of
from tables.lines import lines_batches, lines_schema
from tables.schemas import Unlike, merged
from tables.values import python_values

BATCH_ROWS: Final = 4096
BATCH_BYTES: Final = 16 << 20  # of long documents a batch holds fewer rows: their Python values take as much again
DIGEST_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a table that follow each other. `record` is for tables/ alone."""

    record: pa.RecordBatch

    @property
    def num_rows(self) -> int:
        return self.record.num_rows

    def column(self, name: str) -> list[Any]:
        """The column's Python values, None for a null. Raises KeyError if the batch was read without it."""
        return python_values(self.record.column(name))


@dataclass(frozen=True, slots=True)
class Table:
    """An input table: its files in the order of their rows, the schema that all of them fit, and how many rows."""

    path: Path
    kind: Kind
    files: tuple[Path, ...]
    schema: pa.Schema
    rows: int
    stamps: tuple[tuple[int, int, int], ...]

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(size for size, _, _ in self.stamps)

    def check_unchanged(self) -> None:
        """Raises BadInput if a file was written to, or replaced, since the table was opened."""
        for file, stamp in zip(self.files, self.stamps, strict=True):
            if _stamp(file) != stamp:
                raise BadInput(f"{file}: changed while it was read; run this again when it is complete")

    @property
    def column_names(self) -> list[str]:
        return list(self.schema.names)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Batches of at most BATCH_ROWS rows, in row order, with the columns named, in that order (None: all).

        Raises BadInput for a column that is not there, and for a file that turns out to be damaged.
        """
        names, known = self.column_names if columns is None else list(columns), frozenset(self.column_names)
        for name in names:
            if name not in known:
                raise BadInput(f"{self.path}: has no column {name!r}; it has {', '.join(self.column_names)}")
        wanted = pa.schema([self.schema.field(name) for name in names or self.column_names[:1]])
        for file in self.files:
            with _translated(file, self.kind):
                for read in _read(file, self.kind, wanted):
                    read.validate(full=True)  # offsets beyond the buffers would be read all the same
                    for batch in _cut(read):
                        yield Batch(_conformed(batch, wanted, file).select(names))

    def digest(self, *, on_progress: Callable[[int], None] = lambda _: None) -> str:
        """SHA-256 over the files' lengths and bytes, in hexadecimal; `on_progress` hears of bytes as they are read."""
        digest = hashlib.sha256()
        for file in self.files:
            with _translated(file, self.kind), file.open("rb") as opened:
                digest.update(file.stat().st_size.to_bytes(8, "big"))
                while piece := opened.read(DIGEST_BYTES):
                    digest.update(piece)
                    on_progress(len(piece))
        return digest.hexdigest()


def open_table(path: Path) -> Table:
    """The table at `path`: a file, a folder of files of one kind, or a dataset saved by `save_to_disk`.

    Parquet and Arrow say what they hold; CSV and JSONL are read once, so that a bad row is found here.
    Raises BadInput that names the file, line or row, and the remedy.
    """
    kind, files = files_of(path)
    stamps = tuple(_stamp(file) for file in files)
    schemas = []
    rows = 0
    for file in files:
        with _translated(file, kind):
            schema, found = _inspect(file, kind)
        _check_names(file, schema, rows=found)
        schemas.append(schema)
        rows += found
    schema = _unified(files, schemas)
    if not rows:
        raise BadInput(f"{path}: has no rows")
    return Table(path, kind, files, schema, rows, stamps)


def _stamp(file: Path) -> tuple[int, int, int]:
    """Changes when the file does: size, time of its last change, inode."""
    try:
        found = file.stat()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return found.st_size, found.st_mtime_ns, found.st_ino


def _inspect(file: Path, kind: Kind) -> tuple[pa.Schema, int]:
    if not file.stat().st_size:
        raise BadInput(f"{file}: is empty")
    if kind is Kind.PARQUET:
        return parquet_schema(file)
    if kind is Kind.ARROW:
        return arrow_schema(file)
    if kind is Kind.JSONL:
        return lines_schema(file)
    return delimited_schema(file, delimiter=delimiter_of(kind))


def _read(file: Path, kind: Kind, wanted: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The file's batches with those of the wanted columns that it has."""
    if kind is Kind.JSONL:
        return lines_batches(file, wanted)
    if kind is Kind.PARQUET:
        return parquet_batches(file, wanted.names, batch_rows=BATCH_ROWS, batch_bytes=BATCH_BYTES)
    if kind is Kind.ARROW:
        return arrow_batches(file, wanted.names)
    return delimited_batches(file, wanted.names, delimiter=delimiter_of(kind))


def delimiter_of(kind: Kind) -> str:
    return "\t" if kind is Kind.TSV else ","


def _check_names(file: Path, schema: pa.Schema, *, rows: int) -> None:
    if not schema.names:
        raise BadInput(f"{file}: has no {'columns' if rows else 'rows'}")
    seen: set[str] = set()
    for name in schema.names:
        if name in seen:
            raise BadInput(f"{file}: has two columns named {name!r}; rename one")
        seen.add(name)


def _unified(files: Sequence[Path], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The schema that every file fits: columns that a file lacks are null there, integers may become floats."""
    schema = schemas[0]
    for file, other in zip(files[1:], schemas[1:], strict=True):
        if schema.equals(other):
            continue
        try:
            schema = merged(schema, other)
        except Unlike as error:
            raise BadInput(
                f"{file}: column {error.column} is {error.here} here and {error.before} in the files before; "
                "give it one type in every file, or name a single file"
            ) from error
    held = [frozenset(other.names) for other in schemas]  # `names` makes them anew each time
    lacking = {name for name in schema.names for names in held if name not in names}
    fields = [field.with_nullable(True) if field.name in lacking else field for field in schema]
    return pa.schema(fields).with_metadata(schema.metadata)


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of at most BATCH_ROWS rows and about BATCH_BYTES; nothing of an empty batch."""
    if batch.num_rows:
        row_bytes = max(1, batch.nbytes // batch.num_rows)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _conformed(batch: pa.RecordBatch, wanted: pa.Schema, file: Path) -> pa.RecordBatch:
    """The batch with exactly the wanted columns, each of the wanted type."""
    if batch.schema.equals(wanted):
        return batch
    arrays = []
    for field in wanted:
        if field.name not in batch.schema.names:
            arrays.append(pa.nulls(batch.num_rows, field.type))
            continue
        array = batch.column(field.name)
        try:
            arrays.append(array if array.type == field.type else array.cast(field.type))
        except pa.ArrowException as error:
            told = str(error).splitlines()[0]
            raise BadInput(
                f"{file}: column {field.name} does not become {field.type}, as other files have it ({told}); "
                "give it one type in every file"
            ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


@contextmanager
def _translated(file: Path, kind: Kind) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        told = " ".join(str(error).splitlines()[:1])
        raise BadInput(
            f"{file}: cannot be read as {kind} ({told}); it is damaged or not whole: write it again"
        ) from error
