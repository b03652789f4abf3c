"""What a few rows say of all: the range holds the truth as often as it says."""

from __future__ import annotations

import random

import pytest

from models.states import Outcome
from pipeline.preview import _t, forecast, total
from store.results import ResultRow


@pytest.mark.parametrize(
    ("freedom", "exact"), [(1, 12.706), (3, 3.182), (4, 2.776), (9, 2.262), (19, 2.093), (999, 1.962)]
)
def test_the_quantiles_are_students(freedom: int, exact: float) -> None:
    assert _t(freedom) == pytest.approx(exact, rel=0.01)


def test_a_range_holds_the_truth_in_95_of_100_draws() -> None:
    draw = random.Random(8)
    rows = [draw.lognormvariate(3.0, 0.5) for _ in range(400)]
    ranges = [total(draw.sample(rows, 40), of=400) for _ in range(1000)]
    held = sum((one.least or 0.0) <= sum(rows) <= (one.most or 0.0) for one in ranges)
    assert 915 <= held <= 975  # a lognormal's tail costs a little


def test_of_one_row_there_is_no_range_and_of_all_rows_no_doubt() -> None:
    assert total([4.0], of=10).least is None
    every = total([1.0, 2.0, 3.0], of=3)
    assert (every.least, every.estimate, every.most) == (6.0, 6.0, 6.0)


def test_seconds_are_the_previews_own_rate_and_less_where_slots_were_empty() -> None:
    rows = [
        ResultRow(n, f"row-{n}", Outcome.SUCCEEDED, "engine", 200, "", None, None, duration_ms=2000) for n in range(4)
    ]
    found = forecast(rows, of=400, wall_s=4.0, slots=8).seconds
    assert found.estimate == pytest.approx(400.0)  # two at once
    assert found.least == pytest.approx(100.0) and found.most == pytest.approx(400.0)
