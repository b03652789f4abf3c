"""When an endpoint rests, for how long, and how it comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference.breaker import BASE_S, CAP_S, FAILURES_IN_A_ROW, JUDGED, Breaker


def longest(low: float, high: float) -> float:
    """The unluckiest draw."""
    assert low == 0.0
    return high


def opened(at: float = 100.0) -> Breaker:
    """A breaker that has just opened, for as long as it may."""
    breaker = Breaker(uniform=longest)
    for _ in range(FAILURES_IN_A_ROW):
        assert not breaker.is_open(at)
        breaker.failed(at)
    assert breaker.is_open(at)
    return breaker


def test_five_failures_in_a_row_open_it_and_one_answer_between_them_does_not() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed(0.0)
    breaker.succeeded()
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed(0.0)
    assert not breaker.is_open(0.0) and not breaker.may_probe(0.0)
    breaker.failed(0.0)
    assert breaker.is_open(0.0)


def test_one_that_fails_more_than_half_is_open_though_it_answers_between() -> None:
    breaker = Breaker()
    outcomes = [False, True] * (JUDGED // 2)
    for is_good in outcomes:
        breaker.succeeded() if is_good else breaker.failed(0.0)
    assert not breaker.is_open(0.0)  # half is not more than half
    breaker.failed(0.0)
    breaker.failed(0.0)
    assert breaker.is_open(0.0)


def test_it_lets_one_through_after_its_rest_and_an_answer_closes_it() -> None:
    breaker = opened(at=100.0)
    assert breaker.retry_at == 100.0 + BASE_S
    assert not breaker.may_probe(100.0 + BASE_S / 2)
    assert breaker.may_probe(100.0 + BASE_S) and breaker.is_open(100.0 + BASE_S)
    breaker.succeeded()
    assert not breaker.is_open(101.0) and not breaker.may_probe(101.0)
    for _ in range(FAILURES_IN_A_ROW - 1):  # what was before is forgotten
        breaker.failed(101.0)
    assert not breaker.is_open(101.0)
    breaker.failed(101.0)
    assert breaker.retry_at == 101.0 + BASE_S  # and so is how long it rested


def test_each_failed_probe_doubles_the_rest_up_to_a_minute() -> None:
    breaker = opened(at=0.0)
    rests = []
    for _ in range(10):
        now = breaker.retry_at
        breaker.failed(now)
        rests.append(breaker.retry_at - now)
    assert rests[:3] == [2 * BASE_S, 4 * BASE_S, 8 * BASE_S]
    assert rests[-1] == CAP_S and rests == sorted(rests)


def test_what_was_under_way_when_it_opened_makes_it_rest_no_longer_unless_the_server_says_so() -> None:
    breaker = opened(at=0.0)
    for _ in range(200):
        breaker.failed(0.1)
    assert breaker.retry_at == BASE_S
    breaker.failed(0.1, 20.0)
    assert breaker.retry_at == 20.1
    breaker.failed(20.1)
    assert breaker.retry_at == 20.1 + 2 * BASE_S


@given(
    st.lists(st.tuples(st.sampled_from(["good", "bad", "late"]), st.floats(0, 200), st.floats(0, 100)), max_size=80),
)
def test_an_open_breaker_always_says_when_it_may_be_tried(events: list[tuple[str, float, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for kind, passed_s, retry_after_s in events:
        now += passed_s
        if kind == "good":
            breaker.succeeded()
            assert not breaker.is_open(now)
        else:
            least_s = retry_after_s if kind == "late" else None
            breaker.failed(now, least_s)
            if breaker.is_open(now):
                assert now + (least_s or 0.0) <= breaker.retry_at <= now + max(CAP_S, 100.0) + CAP_S
        assert breaker.may_probe(now) == (breaker.is_open(now) and now >= breaker.retry_at)
        assert not breaker.is_open(now) or breaker.may_probe(max(now, breaker.retry_at))
