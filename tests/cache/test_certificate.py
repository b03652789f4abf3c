"""The certificate holds for every order of errors and every policy, because only its coins are random."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cache.certificate import ALPHA, FIRST_RATE, LEAST_RATE, RATES, Audit, alpha_of, coin

STREAMS = 1000
SERVED_BETWEEN = 10  # right answers between two errors

# What is known before a decision, (number of the error, caught, served), gives (place in RATES, whether it errs).
Adversary = Callable[[int, int, int], tuple[int, bool]]


def test_versions_share_alpha() -> None:
    shares = [alpha_of(version) for version in range(1, 10_000)]
    assert sum(shares) <= ALPHA
    assert math.isclose(sum(shares), ALPHA, rel_tol=1e-3)


def test_the_coin_is_uniform_keyed_and_the_same_for_the_same_job() -> None:
    drawn = np.array([coin(b"key", str(number).encode()) for number in range(20_000)])
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs((drawn < 0.2).mean() - 0.2) < 0.01
    assert coin(b"key", b"1") == coin(b"key", b"1") != coin(b"other", b"1")


def test_the_rates_fall_from_a_half_to_two_percent() -> None:
    assert list(RATES) == sorted(set(RATES), reverse=True)
    assert FIRST_RATE == 0.5
    assert 0.015 < LEAST_RATE < 0.025


def test_without_an_error_the_bound_is_near_the_least_that_the_coins_allow() -> None:
    for rate, most in ((0.5, 8), (RATES[9], 20)):
        audit = Audit.begin(1).at_rate(rate).with_served(10_000)
        assert math.log(1 / ALPHA) / -math.log(1 - rate) < audit.bound() <= most


def test_no_more_wrong_answers_are_possible_than_answers_were_served() -> None:
    assert Audit.begin(1).bound() == 0
    assert Audit.begin(1).with_served(3).bound() == 3
    fallen = Audit.begin(1).with_served(1_000).at_rate(RATES[10])
    assert fallen.bound() == Audit.begin(1).with_served(1_000).bound()
    assert fallen.bound() < fallen.with_served(5).bound() < fallen.with_served(1_000).bound()


def test_more_errors_raise_the_bound_and_those_seen_at_a_low_rate_raise_it_more() -> None:
    none = Audit.begin(1).with_served(1_000).at_rate(RATES[8]).with_served(1_000)
    early, late = none.with_errors(1, FIRST_RATE), none.with_errors(1, RATES[8])
    assert none.bound() < early.bound() < late.bound() < late.with_errors(1, RATES[8]).bound()


def test_a_rate_never_rises_and_an_error_of_an_unknown_rate_counts_at_the_lowest() -> None:
    audit = Audit.begin(1).at_rate(RATES[5]).with_served(1_000)
    assert audit.at_rate(RATES[2]) == audit
    assert audit.with_errors(1, 0.123) == audit.with_errors(1, RATES[5])


@pytest.mark.parametrize(
    "adversary",
    [
        pytest.param(lambda at, caught, served: (0, True), id="errs at one rate"),
        pytest.param(lambda at, caught, served: (at // 5, True), id="errs while the rate falls"),
        pytest.param(lambda at, caught, served: (min(at // 2, 20), at >= 60), id="errs late, at a low rate"),
        pytest.param(lambda at, caught, served: (8, caught == 0), id="errs until it is caught"),
        pytest.param(lambda at, caught, served: (12, served > 4 * caught), id="errs while it is ahead"),
        pytest.param(lambda at, caught, served: (12, served < 8 or caught < 3), id="errs until the bound is tight"),
        pytest.param(lambda at, caught, served: (min(served // 2, 15), True), id="lowers the rate after its luck"),
        pytest.param(lambda at, caught, served: (min(5 * caught, 20), True), id="lowers the rate when caught"),
        pytest.param(lambda at, caught, served: (at // 30 * 6, at % 30 < 4), id="errs in bursts after each fall"),
    ],
)
def test_served_errors_pass_the_bound_in_at_most_alpha_of_streams(adversary: Adversary) -> None:
    random = np.random.default_rng(7)
    broken = sum(_is_ever_false(random.random(90).tolist(), adversary) for _ in range(STREAMS))
    assert broken / STREAMS <= ALPHA


def _is_ever_false(coins: list[float], adversary: Adversary) -> bool:
    audit, caught, served, bound = Audit.begin(1), 0, 0, 0
    for at, drawn in enumerate(coins):
        place, errs = adversary(at, caught, served)
        audit = audit.at_rate(RATES[place]).with_served(SERVED_BETWEEN)
        if not errs:
            continue
        if drawn < audit.rate:
            audit, caught = audit.with_errors(1, audit.rate), caught + 1
        else:
            audit, served = audit.with_served(1), served + 1
            bound = bound if served <= bound else audit.bound()  # it never falls
            if served > bound:
                return True
    return False
