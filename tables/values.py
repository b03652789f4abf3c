"""Columns as Python values, and values as the text that stands in a CSV cell."""

from __future__ import annotations

import base64
import datetime as dt
from typing import Any
from zoneinfo import ZoneInfoNotFoundError

import msgspec
import pyarrow as pa

MICROSECOND = "us"


def python_values(array: pa.Array[Any]) -> list[Any]:
    """One value a row, None for a null; what Python cannot hold (nanoseconds, the year 12000) becomes text."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if not pa.types.is_temporal(array.type):
        return array.to_pylist()
    try:
        return _to_microseconds(array).to_pylist()
    except (pa.ArrowInvalid, OverflowError, ValueError, ZoneInfoNotFoundError):
        naive = array.cast(pa.timestamp(array.type.unit)) if pa.types.is_timestamp(array.type) else array
        return naive.cast(pa.string()).to_pylist()


def _to_microseconds(array: pa.Array[Any]) -> pa.Array[Any]:
    """Nanoseconds as microseconds, which Python has. Raises ArrowInvalid if that would lose some."""
    kind = array.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return array.cast(pa.timestamp(MICROSECOND, kind.tz))
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return array.cast(pa.duration(MICROSECOND))
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return array.cast(pa.time64(MICROSECOND))
    return array


def json_line_encoder() -> msgspec.json.Encoder:
    """Dates in ISO format, decimals as text, bytes as base64, NaN as null."""
    return msgspec.json.Encoder(enc_hook=_text_of_others)


def cell_text(value: Any, encoder: msgspec.json.Encoder) -> str | None:
    """The value as a CSV cell: text as it is, dates in ISO format, bytes as base64, everything nested as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    encoded = encoder.encode(value).decode()
    return encoded[1:-1] if encoded.startswith('"') else encoded


def _text_of_others(value: Any) -> str:
    return value.isoformat() if isinstance(value, dt.date | dt.time) else str(value)
