"""Tables as they are written: the input's rows with columns appended, whole or not at all, in flat memory.

Nothing here knows what the appended columns mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from runtime.errors import BadInput
from tables.files import SUFFIXES, Kind, kind_of, known_suffixes
from tables.reading import Batch, Table, delimiter_of
from tables.values import cell_text, json_line_encoder, python_values

# Row groups as readers like them: enough rows for the encodings to pay, and memory that a laptop does not notice.
GROUP_ROWS: Final = 65_536
GROUP_BYTES: Final = 64 << 20
INTEGERS: Final = range(-(1 << 63), 1 << 63)


class ColumnKind(StrEnum):
    """The type of an appended column."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"


@dataclass(frozen=True, slots=True)
class AddedColumn:
    """A column that is appended to the input's."""

    name: str
    kind: ColumnKind


TYPES: Final[Mapping[ColumnKind, pa.DataType]] = {
    ColumnKind.TEXT: pa.string(),
    ColumnKind.INTEGER: pa.int64(),
    ColumnKind.NUMBER: pa.float64(),
    ColumnKind.BOOLEAN: pa.bool_(),
}


class Writer:
    """Takes batches of the input in row order, and the appended columns' values for each."""

    def __init__(self, put: Callable[[pa.RecordBatch], None], schema: pa.Schema, added: Sequence[AddedColumn]) -> None:
        self._put = put
        self._schema = schema
        self._added = added

    def write(self, batch: Batch, columns: Mapping[str, Sequence[Any]]) -> None:
        """`columns` holds a value for every row of `batch`, by the name of each appended column.

        A value that its column's kind cannot hold (an integer beyond 64 bits, text among numbers) becomes null.
        """
        arrays = [_array(columns[column.name], column.kind) for column in self._added]
        self._put(pa.RecordBatch.from_arrays([*batch.record.columns, *arrays], schema=self._schema))


def check_output(path: Path, table: Table, added: Sequence[AddedColumn]) -> None:
    """Raises BadInput if `table` with the columns `added` cannot be written at `path`; ask before anything is run."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path}: results are written as {known_suffixes()}; name it so")
    kind = kind_of(path)
    if not path.parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"{path}: the folder {path.parent} may not be written to; name a file elsewhere")
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; name a file")
    if path.exists() and any(path.samefile(file) for file in table.files):
        raise BadInput(f"{path}: is the input itself; name another file")
    if table.path.is_dir() and path.resolve().is_relative_to(table.path.resolve()):
        raise BadInput(f"{path}: is in the input's folder, where it would be read as input; name a file elsewhere")
    names = list(table.column_names)
    for column in added:
        if column.name in table.column_names:
            raise BadInput(
                f"{table.path}: has a column {column.name!r} already, which the result would be called; "
                'give the result columns a prefix: --result-prefix llm_ (Python: result_prefix="llm_")'
            )
        if column.name in names:
            raise BadInput(f"two result columns would be called {column.name!r}; rename that property in the schema")
        names.append(column.name)
    _check_types(path, kind, table.schema)


@contextmanager
def writer_for(path: Path, table: Table, added: Sequence[AddedColumn]) -> Iterator[Writer]:
    """A writer of `path`, which takes its place when the block ends well; else `path` stays as it was.

    Raises BadInput as `check_output` does.
    """
    check_output(path, table, added)
    fields = [*table.schema, *(pa.field(column.name, TYPES[column.kind]) for column in added)]
    schema = pa.schema(fields).with_metadata(table.schema.metadata)
    part = path.with_name(path.name + ".part")
    try:
        with _opened(part, kind_of(path), schema, table) as put:
            yield Writer(put, schema, added)
        part.replace(path)
    except OSError as error:  # pyarrow's too
        raise BadInput(
            f"{path}: cannot be written ({error.strerror or error}); make room, or name another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _array(values: Sequence[Any], kind: ColumnKind) -> pa.Array[Any]:
    return pa.array([_fitting(value, kind) for value in values], TYPES[kind])


def _fitting(value: Any, kind: ColumnKind) -> Any:
    """The value as the kind holds it, None if it does not; half a surrogate pair in a text becomes a question mark."""
    if kind is ColumnKind.TEXT and isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if kind is ColumnKind.BOOLEAN and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind is ColumnKind.INTEGER:
        return int(value) if (isinstance(value, int) or value.is_integer()) and int(value) in INTEGERS else None
    return _as_float(value) if kind is ColumnKind.NUMBER else None


def _as_float(value: float) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def _check_types(path: Path, kind: Kind, schema: pa.Schema) -> None:
    """Raises BadInput for a column that the file format cannot hold."""
    for field in schema:
        if kind is Kind.PARQUET:
            try:
                pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
            except pa.ArrowException as error:
                raise BadInput(
                    f"{path}: Parquet cannot hold column {field.name} ({field.type}); write .jsonl or .arrow"
                ) from error
        elif kind is Kind.ARROW and _has_dictionary_within(field.type):
            raise BadInput(f"{path}: column {field.name} ({field.type}) does not go into an Arrow file; write .parquet")


def _has_dictionary_within(type_: pa.DataType) -> bool:
    within = [type_.field(number).type for number in range(type_.num_fields)]
    return any(pa.types.is_dictionary(inner) or _has_dictionary_within(inner) for inner in within)


def _opened(
    part: Path, kind: Kind, schema: pa.Schema, table: Table
) -> AbstractContextManager[Callable[[pa.RecordBatch], None]]:
    if kind is Kind.PARQUET:
        return _parquet(part, schema)
    if kind is Kind.ARROW:
        return _arrow(part, schema, table)
    if kind is Kind.JSONL:
        return _lines(part)
    return _delimited(part, schema, delimiter=delimiter_of(kind))


@contextmanager
def _parquet(part: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    held: list[pa.RecordBatch] = []

    with pq.ParquetWriter(part, schema, compression="zstd") as writer:

        def write_group() -> None:
            if held:
                writer.write_table(pa.Table.from_batches(held, schema))
                held.clear()

        def put(record: pa.RecordBatch) -> None:
            held.append(record)
            if sum(one.num_rows for one in held) >= GROUP_ROWS or sum(one.nbytes for one in held) >= GROUP_BYTES:
                write_group()

        yield put
        write_group()


@contextmanager
def _arrow(part: Path, schema: pa.Schema, table: Table) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """An Arrow file has one dictionary a column: those of all batches are laid together first."""
    dictionaries = {
        field.name: _dictionary(table, field.name) for field in table.schema if pa.types.is_dictionary(field.type)
    }
    for name, values in dictionaries.items():
        number = schema.get_field_index(name)
        field = schema.field(number)
        schema = schema.set(number, field.with_type(_indexing(field.type, values)))
    with pa.ipc.new_file(str(part), schema) as writer:

        def put(record: pa.RecordBatch) -> None:
            for name, values in dictionaries.items():
                array = _encoded(record.column(name), values, schema.field(name).type)
                record = record.set_column(record.schema.get_field_index(name), schema.field(name), array)
            writer.write_batch(record)

        yield put


def _dictionary(table: Table, name: str) -> pa.Array[Any]:
    """All values of a dictionary column, in the order in which they come."""
    found: list[pa.Array[Any]] = []
    for batch in table.batches([name]):
        column: Any = batch.record.column(name)
        values = column.dictionary
        if not found or not values.equals(found[-1]):
            found.append(values)
        if len(found) > 64:  # row groups have dictionaries of their own, mostly of the same values
            found = [pc.unique(pa.concat_arrays(found))]
    return pc.unique(pa.concat_arrays(found))


def _indexing(type_: Any, values: pa.Array[Any]) -> Any:
    """The type, its indices as wide as so many values need."""
    width = type_.index_type.bit_width - pa.types.is_signed_integer(type_.index_type)
    return type_ if len(values) <= 1 << width else pa.dictionary(pa.int32(), type_.value_type, type_.ordered)


def _encoded(array: Any, values: pa.Array[Any], type_: Any) -> Any:
    if array.type == type_ and array.dictionary.equals(values):
        return array
    indices = pc.index_in(array.cast(type_.value_type), value_set=values).cast(type_.index_type)
    return pa.DictionaryArray.from_arrays(indices, values, ordered=type_.ordered)


@contextmanager
def _lines(part: Path) -> Iterator[Callable[[pa.RecordBatch], None]]:
    encoder = json_line_encoder()
    with part.open("wb") as opened:

        def put(record: pa.RecordBatch) -> None:
            columns = [python_values(column) for column in record.columns]
            opened.write(
                encoder.encode_lines(
                    [dict(zip(record.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
                )
            )

        yield put


@contextmanager
def _delimited(part: Path, schema: pa.Schema, *, delimiter: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Text is quoted and a null is not, so that an empty text and a null stay two things."""
    encoder = json_line_encoder()
    cells = pa.schema([(field.name, field.type if _is_plain(field.type) else pa.string()) for field in schema])
    options = pa_csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
    with pa_csv.CSVWriter(str(part), cells, write_options=options) as writer:

        def put(record: pa.RecordBatch) -> None:
            arrays = [
                column
                if _is_plain(column.type)
                else pa.array([cell_text(value, encoder) for value in python_values(column)], pa.string())
                for column in record.columns
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=cells))

        yield put


def _is_plain(type_: pa.DataType) -> bool:
    """Whether pyarrow's own CSV text of the type is the one that we want."""
    return any(
        test(type_)
        for test in (
            pa.types.is_null,
            pa.types.is_boolean,
            pa.types.is_integer,
            pa.types.is_floating,
            pa.types.is_decimal,
            pa.types.is_string,
            pa.types.is_large_string,
        )
    )
