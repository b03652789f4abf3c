"""When a schedule is due: zones, hours that a clock skips or repeats, and what becomes of missed times."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest

from models.states import Missed
from pipeline.due_times import MOST_MISSED, Owed, checked_cron, due_times, owed, zone_of
from runtime.errors import BadInput

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
MISSED_AFTER_S = 300.0


def shown(cron: str, after: datetime, count: int, zone: ZoneInfo = BERLIN) -> list[str]:
    return [f"{due.astimezone(zone):%d %H:%M %z}" for due in islice(due_times(cron, zone, after=after), count)]


def owed_at(until: datetime, missed: Missed, cron: str = "0 * * * *", *, hours: float = 4) -> Owed:
    return owed(
        cron, BERLIN, after=until - timedelta(hours=hours), until=until, missed=missed, missed_after_s=MISSED_AFTER_S
    )


def test_a_due_time_is_the_zones_own_all_year() -> None:
    summer = next(due_times("0 2 * * *", BERLIN, after=NOON))
    winter = next(due_times("0 2 * * *", BERLIN, after=datetime(2026, 12, 1, tzinfo=UTC)))
    assert (summer.hour, winter.hour) == (0, 1)
    assert next(due_times("@daily", ZoneInfo("Asia/Kolkata"), after=NOON)) == datetime(2026, 6, 1, 18, 30, tzinfo=UTC)


def test_a_fixed_time_in_a_skipped_hour_runs_once_after_it() -> None:
    before = datetime(2026, 3, 28, 12, tzinfo=UTC)  # at 01:00 UTC the clock goes from 02:00 to 03:00
    assert shown("30 2 * * *", before, 2) == ["29 03:00 +0200", "30 02:30 +0200"]
    assert shown("15,45 2 * * *", before, 2) == ["29 03:00 +0200", "30 02:15 +0200"]
    assert shown("*/30 * * * *", datetime(2026, 3, 29, 0, 40, tzinfo=UTC), 2) == ["29 03:00 +0200", "29 03:30 +0200"]


def test_a_fixed_time_in_a_repeated_hour_runs_once_and_an_interval_goes_on() -> None:
    before = datetime(2026, 10, 24, 12, tzinfo=UTC)  # at 01:00 UTC the clock goes from 03:00 back to 02:00
    assert shown("30 2 * * *", before, 2) == ["25 02:30 +0200", "26 02:30 +0100"]
    for minutes in range(0, 180, 10):  # wherever somebody looks, the second 02:30 is not due, nor the first again
        at = datetime(2026, 10, 25, 0, 30, tzinfo=UTC) + timedelta(minutes=minutes)
        assert shown("30 2 * * *", at, 1) == ["26 02:30 +0100"]
    assert shown("30 * * * *", datetime(2026, 10, 25, 0, 0, tzinfo=UTC), 3) == [
        "25 02:30 +0200",
        "25 02:30 +0100",
        "25 03:30 +0100",
    ]


def test_of_a_repeated_hour_both_times_of_an_interval_are_owed() -> None:
    found = owed_at(datetime(2026, 10, 25, 2, 0, tzinfo=UTC), Missed.ALL, "*/30 2 * * *")
    assert [f"{due:%H:%M}" for due in found.runs] == ["00:00", "00:30", "01:00", "01:30"]


def test_what_is_due_in_time_runs_whatever_is_to_become_of_missed_times() -> None:
    for missed in Missed:
        found = owed_at(NOON + timedelta(minutes=2), missed, "* * * * *", hours=0.05)
        assert found.runs == [NOON, NOON + timedelta(minutes=1), NOON + timedelta(minutes=2)]
        assert found.let_go is None


@pytest.mark.parametrize(("missed", "hours"), [(Missed.ONCE, [12]), (Missed.ALL, [9, 10, 11, 12]), (Missed.SKIP, [])])
def test_missed_times_run_once_all_or_not(missed: Missed, hours: list[int]) -> None:
    found = owed_at(NOON + timedelta(minutes=30), missed)
    assert [due.hour for due in found.runs] == hours
    let_go = {Missed.ONCE: NOON - timedelta(hours=1), Missed.ALL: None, Missed.SKIP: NOON}
    assert found.let_go == let_go[missed]


def test_a_missed_time_is_not_caught_up_with_where_a_later_one_is_due_anyway() -> None:
    found = owed_at(NOON + timedelta(minutes=2), Missed.ONCE)
    assert (found.runs, found.let_go) == ([NOON], NOON - timedelta(hours=1))


def test_after_years_the_newest_hundred_are_found_at_once() -> None:
    began = time.monotonic()
    found = owed_at(NOON, Missed.ALL, "* * * * *", hours=24 * 365 * 5)
    assert time.monotonic() - began < 1
    assert found.runs == [NOON - timedelta(minutes=minutes) for minutes in reversed(range(MOST_MISSED))]
    assert found.let_go == NOON - timedelta(minutes=MOST_MISSED)
    yearly = owed_at(NOON, Missed.ALL, "@yearly", hours=24 * 365 * 5)
    assert [due.year for due in yearly.runs] == [2021, 2022, 2023, 2024, 2025]


@pytest.mark.parametrize(
    ("cron", "says"),
    [
        ("0 2 * *", "write five fields"),
        ("0 0 2 * * *", "write five fields"),
        ("60 2 * * *", "bad minute"),
        ("0 2 * * funday", "bad day-of-week"),
        ("0 0 31 2 *", "bad day-of-month"),
        ("@reboot", "wrong number of fields"),
        ("", "write five fields"),
    ],
)
def test_an_expression_that_is_none_is_refused_with_an_example(cron: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        checked_cron(cron, BERLIN, after=NOON)
    assert "minute hour day month weekday" in str(caught.value)


@pytest.mark.parametrize("name", ["Europe/Berln", "", "../../etc/passwd", "/etc/passwd", "Mars/Phobos", "Europe", "\0"])
def test_a_zone_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="no time zone"):
        zone_of(name)


def test_a_time_that_comes_once_in_28_years_is_found() -> None:
    assert checked_cron("0 0 * 2 MON#5", BERLIN, after=NOON).year == 2044


def test_a_zone_like_it_is_named() -> None:
    with pytest.raises(BadInput, match="did you mean Europe/Berlin"):
        zone_of("Europe/Berln")
