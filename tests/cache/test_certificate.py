"""The certificate holds for every order of errors and every policy, because only its coins are random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cache.certificate import ALPHA, FIRST_RATE, LEAST_RATE, Audit, alpha_of, audit_rate, coin
from cache.policy import Limits, Policy

STREAMS = 1500


def test_versions_share_alpha() -> None:
    shares = [alpha_of(version) for version in range(1, 10_000)]
    assert sum(shares) <= ALPHA
    assert math.isclose(sum(shares), ALPHA, rel_tol=1e-3)


def test_the_coin_is_uniform_keyed_and_the_same_for_the_same_job() -> None:
    drawn = np.array([coin(b"key", str(number).encode()) for number in range(20_000)])
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs((drawn < 0.2).mean() - 0.2) < 0.01
    assert coin(b"key", b"1") == coin(b"key", b"1") != coin(b"other", b"1")


def test_the_rate_never_rises_and_keeps_its_ends() -> None:
    rates = [audit_rate(lookups) for lookups in range(0, 500_000, 100)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (FIRST_RATE, LEAST_RATE)


def test_more_errors_and_lower_rates_raise_the_bound() -> None:
    none = Audit.begin(1, rate=0.2)
    one = none.with_error(0.2)
    assert 14 < none.bound() < 20
    assert none.bound() < one.bound() < one.with_error(0.2).bound()
    assert none.at_rate(0.1).bound() > none.bound()
    assert one.at_rate(0.4).bound() == one.bound()


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        ("rare from the start", lambda n: 0.004),
        ("none, then many: drift", lambda n: 0.0 if n < 3000 else 0.2),
        ("many, then none", lambda n: 0.1 if n < 500 else 0.0),
        ("in bursts", lambda n: 0.5 if n % 1000 < 20 else 0.0),
    ],
)
def test_the_true_number_of_served_errors_passes_the_bound_in_at_most_alpha_of_streams(
    name: str, chance: object
) -> None:
    """Every lookup is decided to be served; the adversary fixes the errors, the coins are drawn apart."""
    random = np.random.default_rng(7)
    lookups = 6000
    errors = np.flatnonzero([random.random() < chance(n) for n in range(lookups)])  # type: ignore[operator]
    rates = np.array([audit_rate(int(n)) for n in errors])
    broken = 0
    for _ in range(STREAMS // 5):
        audited = random.random(len(errors)) < rates
        broken += _is_ever_false(audited, rates)
    assert broken / (STREAMS // 5) <= ALPHA + 0.02, name


def test_an_adversary_that_sees_the_coins_of_the_past_gains_nothing() -> None:
    """It errs on until an audit catches it, then is honest for ever: the worst that optional stopping can do."""
    random = np.random.default_rng(11)
    broken = 0
    for _ in range(STREAMS):
        audited = random.random(200) < 0.2
        caught = int(np.argmax(audited)) + 1 if audited.any() else 200
        broken += _is_ever_false(audited[:caught], np.full(caught, 0.2))
    assert broken / STREAMS <= ALPHA


def test_a_version_serves_nothing_without_a_threshold_or_evidence() -> None:

    policy = Policy.begin(1, Limits())
    assert not policy.is_serving
    assert policy.bounds()[0] == 0.0


def _is_ever_false(
    audited: np.ndarray[tuple[int], np.dtype[np.bool_]], rates: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> bool:
    audit = Audit.begin(1)
    served_errors = 0
    bound = None
    for seen, rate in zip(audited.tolist(), rates.tolist(), strict=True):
        lowered = audit.at_rate(rate)
        if lowered.rate != audit.rate or bound is None:
            audit, bound = lowered, None
        if seen:
            audit, bound = audit.with_error(rate), None
        else:
            served_errors += 1
        if bound is None:
            bound = audit.bound()
        if served_errors > bound:
            return True
    return False
