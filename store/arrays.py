"""Columns of rows as Postgres arrays in its binary form: what bulk statements `unnest`.

A plain list goes as text: psycopg quotes every string with a regular expression, and Postgres reads it back, which
for a shard's 64 responses was more of a worker's time than the rest of the write together.
"""

from __future__ import annotations

import struct
from struct import Struct
from typing import Any, ClassVar

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

_HEADER = Struct(">iiiii")  # dimensions, whether it has nulls, the elements' type, their count, the first one's place
_NO_DIMENSIONS = bytes(8)  # of an empty one, and no nulls
_NULL = b"\xff\xff\xff\xff"
_LENGTH = Struct(">i")
_TEXT, _INT2, _INT4, _INT8, _FLOAT4 = 25, 21, 23, 20, 700


class Int2s(list[int | None]):
    """A column of int2."""


class Int4s(list[int | None]):
    """A column of int4."""


class Int8s(list[int | None]):
    """A column of int8."""


class Float4s(list[float | None]):
    """A column of float4."""


class Texts(list[str | None]):
    """A column of text."""


def register(connection: psycopg.Connection[Any]) -> None:
    """Let this connection send columns."""
    for column, dumper in _DUMPERS.items():
        connection.adapters.register_dumper(column, dumper)


class _ColumnDumper(Dumper):
    format = Format.BINARY
    element_oid: ClassVar[int]

    def dump(self, obj: list[Any]) -> bytes:
        if not obj:
            return _NO_DIMENSIONS + _LENGTH.pack(self.element_oid)
        element = self.element
        header = _HEADER.pack(1, 1, self.element_oid, len(obj), 1)
        try:
            return b"".join([header, *(_NULL if value is None else element(value) for value in obj)])
        except (struct.error, OverflowError) as error:
            raise psycopg.DataError(f"a value is out of its column's range: {error}") from error

    def element(self, value: Any) -> bytes:
        raise NotImplementedError


def _packing(element_oid: int, array_oid: int, form: str) -> type[_ColumnDumper]:
    packed = Struct(form)
    size = packed.size - 4

    class Packing(_ColumnDumper):
        oid = array_oid

        def element(self, value: Any) -> bytes:
            return packed.pack(size, value)

    Packing.element_oid = element_oid
    return Packing


class _TextsDumper(_ColumnDumper):
    oid = 1009
    element_oid = _TEXT

    def element(self, value: str) -> bytes:
        encoded = value.encode()
        return _LENGTH.pack(len(encoded)) + encoded


_DUMPERS: dict[type, type[Dumper]] = {
    Int2s: _packing(_INT2, 1005, ">ih"),
    Int4s: _packing(_INT4, 1007, ">ii"),
    Int8s: _packing(_INT8, 1016, ">iq"),
    Float4s: _packing(_FLOAT4, 1021, ">if"),
    Texts: _TextsDumper,
}
