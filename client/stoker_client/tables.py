"""Rows of every kind that run() takes, under one shape. pandas, polars and pyarrow are never imported here.

Their objects are recognised by the module of their class; a library whose object was passed is loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import repeat
from typing import Any, Final, Protocol

from stoker_client.errors import BadInput

BATCH_ROWS: Final = 1024  # of an Arrow table as Python objects at a time
SHOWN_NAMES: Final = 20


class Kind(Enum):
    """What a result column holds, with its type in (pandas, polars, pyarrow). Any value may be null."""

    TEXT = ("string", "String", "string")
    INTEGER = ("Int64", "Int64", "int64")
    NUMBER = ("Float64", "Float64", "float64")
    BOOLEAN = ("boolean", "Boolean", "bool_")


@dataclass(frozen=True, slots=True)
class Column:
    """A result column: one value or None for each row."""

    name: str
    kind: Kind
    values: list[Any]


class Table(Protocol):
    """Rows. `names` are all columns'; None if the rows are bare texts. `count` is that of the rows."""

    names: list[str] | None
    count: int

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """For each row the values of these columns, row by row, without a copy of the whole."""
        ...


class Frame(Table, Protocol):
    """A table that can have columns appended, which gives a new object of the user's own kind."""

    def appended(self, columns: Sequence[Column]) -> Any:
        """The same rows in the same order, with these columns after the others."""
        ...


def table_of(rows: Any) -> Table:
    """The rows under one shape. Raises BadInput for what has none, or has no row."""
    made = _made(rows)
    if made is None:
        raise BadInput(
            f"rows: cannot be a {type(rows).__module__}.{type(rows).__name__}; pass a pandas or polars DataFrame, a "
            "pyarrow Table, a list of dicts or a list of strings (of a column: frame[['name']], or a list of it)"
        )
    if made.count == 0:
        raise BadInput("rows: there are none; pass at least one")
    return made


def kept(rows: Any) -> Any:
    """The rows as they are now, whatever the caller does to theirs later; no value is copied where that can be helped.

    Dicts in a list stay the caller's: once the lines are written, nothing of them is needed.
    """
    if isinstance(rows, list):
        return rows.copy()
    frame = _frame_of(rows)
    return rows if frame is None else frame.kept(rows)


def is_frame(rows: Any) -> bool:
    """Whether results come back as a table, not as a list of answers."""
    return not isinstance(rows, list | tuple)


def check_columns(table: Table, slots: Sequence[str]) -> None:
    """Raises BadInput unless each slot is the name of just one column."""
    names = table.names or []
    shown = ", ".join(names[:SHOWN_NAMES]) + (f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else "")
    if missing := [slot for slot in slots if slot not in names]:
        raise BadInput(
            f"prompt: there is no column {', '.join(missing)}; there are: {shown}. Only {{name}} with letters, digits "
            "and _ is a slot"
        )
    if twice := [slot for slot in slots if names.count(slot) > 1]:
        raise BadInput(f"rows: there are several columns called {twice[0]}; rename all but one")


class _Pandas:
    def __init__(self, frame: Any) -> None:
        if frame.columns.nlevels != 1:
            raise BadInput("rows: its columns have several levels; flatten their names first")
        self._frame = frame
        self.names: list[str] | None = [name for name in frame.columns if isinstance(name, str)]
        self.count = len(frame)

    @staticmethod
    def kept(frame: Any) -> Any:
        copies_on_write = int(sys.modules["pandas"].__version__.partition(".")[0]) >= 3
        return frame.copy(deep=not copies_on_write)

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return zip(*(self._frame[column] for column in columns), strict=True)

    def appended(self, columns: Sequence[Column]) -> Any:
        pandas = sys.modules["pandas"]
        return self._frame.assign(
            **{column.name: pandas.array(column.values, dtype=column.kind.value[0]) for column in columns}
        )


class _Polars:
    def __init__(self, frame: Any) -> None:
        self._frame = frame.collect() if hasattr(frame, "collect") else frame
        self.names: list[str] | None = self._frame.columns
        self.count: int = self._frame.height

    @staticmethod
    def kept(frame: Any) -> Any:
        return frame.clone()  # of the handle; columns are never written to while two hold them

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        rows: Iterator[tuple[Any, ...]] = self._frame.select(columns).iter_rows()
        return rows

    def appended(self, columns: Sequence[Column]) -> Any:
        polars: Any = sys.modules["polars"]
        return self._frame.with_columns(
            [
                polars.Series(column.name, column.values, dtype=getattr(polars, column.kind.value[1]))
                for column in columns
            ]
        )


class _Arrow:
    def __init__(self, table: Any) -> None:
        self._table = table
        self.names: list[str] | None = table.column_names
        self.count: int = table.num_rows

    @staticmethod
    def kept(table: Any) -> Any:
        return table  # it cannot change

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for batch in self._table.select(list(columns)).to_batches(max_chunksize=BATCH_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def appended(self, columns: Sequence[Column]) -> Any:
        arrow: Any = sys.modules["pyarrow"]
        table = self._table
        for column in columns:
            kind = getattr(arrow, column.kind.value[2])()
            table = table.append_column(arrow.field(column.name, kind), arrow.array(column.values, kind))
        return table


class _Texts:
    def __init__(self, rows: Sequence[str]) -> None:
        self._rows = rows
        self.names: list[str] | None = None
        self.count = len(rows)

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return zip(*repeat(self._rows, len(columns)), strict=True)


class _Mappings:
    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.names: list[str] | None = list(dict.fromkeys(name for row in rows for name in row))
        self.count = len(rows)

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return (tuple(row.get(column) for column in columns) for row in self._rows)


_FRAMES: Final[dict[tuple[str, str], type[_Pandas | _Polars | _Arrow]]] = {
    ("pandas", "DataFrame"): _Pandas,
    ("polars", "DataFrame"): _Polars,
    ("polars", "LazyFrame"): _Polars,
    ("pyarrow", "Table"): _Arrow,
}


def _made(rows: Any) -> Table | None:
    if isinstance(rows, list | tuple):
        return _listed(rows)
    frame = _frame_of(rows)
    return None if frame is None else frame(rows)


def _frame_of(rows: Any) -> type[_Pandas | _Polars | _Arrow] | None:
    """What takes the rows, if they are a table of a library, or of a class that extends it."""
    names = ((base.__module__.partition(".")[0], base.__name__) for base in type(rows).__mro__)
    return next((_FRAMES[name] for name in names if name in _FRAMES), None)


def _listed(rows: Sequence[Any]) -> Table:
    texts = not rows or isinstance(rows[0], str) or rows[0] is None
    wanted: Any = (str, type(None)) if texts else Mapping
    for number, row in enumerate(rows, 1):
        if not isinstance(row, wanted):
            raise BadInput(f"rows: row {number} is a {type(row).__name__}; a list has either strings or dicts")
    return _Texts(rows) if texts else _Mappings(rows)
