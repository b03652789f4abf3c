"""Time and time-ordered ids. Wall-clock times are aware UTC; durations come from `time.monotonic`."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

WEEK = timedelta(weeks=1)


def utc_now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(UTC)


def uuid7() -> UUID:
    """A UUIDv7 (RFC 9562): 48 bits of unix milliseconds, then random; ids of one process sort by time."""
    return _uuid7_at(time.time_ns() // 1_000_000, random_bits=secrets.randbits(74))


def uuid7_floor(moment: datetime) -> UUID:
    """The smallest UUIDv7 of a moment: the bound of a partition that begins then."""
    milliseconds = int(moment.timestamp() * 1000)
    return UUID(int=milliseconds << 80)


def week_start(moment: datetime) -> datetime:
    """Monday 00:00 UTC of the moment's ISO week."""
    midnight = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight - timedelta(days=midnight.weekday())


def _uuid7_at(milliseconds: int, *, random_bits: int) -> UUID:
    high = random_bits >> 62
    low = random_bits & ((1 << 62) - 1)
    return UUID(int=(milliseconds << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low)
