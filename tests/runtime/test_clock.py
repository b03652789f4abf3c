"""Time-ordered ids and the weeks that partitions begin with."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from uuid import RFC_4122

from hypothesis import given
from hypothesis import strategies as st

from runtime.clock import WEEK, utc_now, uuid7, uuid7_floor, week_start

MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def test_now_is_aware_and_in_utc() -> None:
    assert utc_now().utcoffset() == timedelta(0)


def test_an_id_is_a_version_7_uuid_of_this_moment() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid7()
    assert (made.version, made.variant) == (7, RFC_4122)
    assert before <= made.int >> 80 <= time.time_ns() // 1_000_000


def test_ids_differ_and_sort_by_their_millisecond() -> None:
    made = [uuid7() for _ in range(10_000)]
    assert len(set(made)) == len(made)
    assert [one.int >> 80 for one in made] == sorted(one.int >> 80 for one in made)


@given(MOMENTS)
def test_every_id_of_a_moment_lies_in_its_weeks_partition(moment: datetime) -> None:
    start = week_start(moment)
    assert start <= moment < start + WEEK
    assert uuid7_floor(start) <= uuid7_floor(moment) < uuid7_floor(start + WEEK)
    assert uuid7_floor(moment).int >> 80 == (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


@given(MOMENTS)
def test_a_week_begins_on_monday_midnight_utc(moment: datetime) -> None:
    start = week_start(moment)
    assert (start.weekday(), start.hour, start.minute, start.second, start.microsecond) == (0, 0, 0, 0, 0)
    assert start.isocalendar()[:2] == moment.isocalendar()[:2]


def test_the_week_is_that_of_utc_whatever_the_zone() -> None:
    kiritimati = timezone(timedelta(hours=14))
    assert week_start(datetime(2026, 11, 23, 8, tzinfo=kiritimati)) == datetime(2026, 11, 16, tzinfo=UTC)
