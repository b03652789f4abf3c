"""The certificate: how many answers served from the cache may have been other than the engine's, at every moment.

Each lookup draws a coin before it is scored. A lookup that would be served and whose coin is below the audit rate is
run by the engine instead, so that its error, if it is one, is seen and not served. Errors are arbitrary: nothing is
assumed of the order of lookups, of their likeness, or of the policy, which may change at any time. Only coins are
random.

The argument. Number the errors of decisions to serve in the order of the decisions. Error i is audited with
probability p(i), and p(i) and a bet b(i) < p(i) were fixed by what was known before its coin was looked at. The factor

    (1 - b / p) / (1 - b) if it is audited,    1 / (1 - b) if it is served

has expectation (p - b + 1 - p) / (1 - b) = 1 given all that went before, so the product over the errors is a
martingale that begins at 1, whoever chose the errors and knowing whichever earlier coins; and so is a mixture, with
fixed weights, of products for several bets. By Ville's inequality (1939) it reaches 1 / alpha at any moment with
probability alpha at most. How many errors were audited, at which rates, is known. How many were served, and at which
rates, is not: so the product is taken at the least that it can be for a total of u served errors. The factor of a
served error grows with the rate it was served at (bets are min(g, share of p)), for every bet alike; the least
product therefore has as many errors as answers were served at the lowest rate, then at the next one, and so on. It
grows with u, and the least u at which it reaches 1 / alpha was reached with probability alpha at most. This is a
betting confidence sequence (Waudby-Smith and Ramdas, arXiv 2010.09686) for a total under Bernoulli audits.

A moment is one at which the audits of all decisions that are counted have been judged. Between a shard's decisions
and its judgements there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

ALPHA: Final = 0.05
# Audit rates. Few, so that answers served are counted by rate; each is a tenth below the one before. With no error seen
# a rate p leaves ln(1 / alpha) / -ln(1 - p) errors possible: 5 at the first, 150 at the last.
RATES: Final = tuple(round(0.5 * 0.9**step, 4) for step in range(32))
FIRST_RATE: Final = RATES[0]
LEAST_RATE: Final = RATES[-1]
# The mixture: each bet is g, or a share of the audit rate where that is less; weights before normalising. Large ones
# pay while few errors were seen, small ones when many were.
_SHARES_OF_RATE: Final = {0.97: 0.5, 0.65: 0.5}
_LARGEST: Final = 0.5 * 0.75 ** np.arange(16)
_BETS: Final = np.repeat(_LARGEST, len(_SHARES_OF_RATE))
_SHARES: Final = np.tile(list(_SHARES_OF_RATE), len(_LARGEST))
_WEIGHTS: Final = np.outer(_LARGEST, list(_SHARES_OF_RATE.values())).ravel()


def coin(secret: bytes, job: bytes) -> float:
    """The audit coin of a job, uniform in [0, 1): audited when below the rate. The same at every try of the job."""
    return int.from_bytes(blake2b(job, key=secret, digest_size=7).digest()) / 2**56


def alpha_of(version: int) -> float:
    """The share of ALPHA that a version has, from 1: the shares of all versions sum to ALPHA."""
    return 0.9 * ALPHA if version == 1 else 0.1 * ALPHA / ((version - 1) * version)


@dataclass(frozen=True, slots=True)
class AtRate:
    """What was served and what audits found wrong, of the decisions at one audit rate."""

    rate: float
    served: float = 0
    errors: float = 0


@dataclass(frozen=True, slots=True)
class Audit:
    """What the audits of one version have shown. `rates` has every audit rate so far, falling."""

    alpha: float
    rates: tuple[AtRate, ...]

    @classmethod
    def begin(cls, version: int) -> Audit:
        """No audit yet."""
        return cls(alpha_of(version), (AtRate(FIRST_RATE),))

    @property
    def rate(self) -> float:
        """What the coins of the next lookups are compared with."""
        return self.rates[-1].rate

    def at_rate(self, rate: float) -> Audit:
        """The next lookups are audited at this rate; a higher one than now is not taken."""
        return replace(self, rates=(*self.rates, AtRate(rate))) if rate < self.rate else self

    def with_served(self, served: float) -> Audit:
        """So many more answers were served at the present rate."""
        last = self.rates[-1]
        return replace(self, rates=(*self.rates[:-1], replace(last, served=last.served + served)))

    def with_errors(self, errors: float, rate: float) -> Audit:
        """So many more decisions to serve, made at this rate, were found to be wrong by their audits.

        One of a rate that this version never had counts for most, at the lowest.
        """
        rate = rate if any(at.rate == rate for at in self.rates) else self.rate
        counted = [replace(at, errors=at.errors + errors) if at.rate == rate else at for at in self.rates]
        return replace(self, rates=tuple(counted))

    def bound(self) -> int:
        """At most so many wrong answers were served, with probability 1 - alpha at all moments at once."""
        return math.floor(self.least_excluded())

    def seen(self) -> float:
        """The decisions that audits found to be wrong: they were not served."""
        return sum(at.errors for at in self.rates)

    def expected(self) -> float:
        """The wrong answers that were served, as the audits let expect: no bound."""
        return sum(at.errors * (1 - at.rate) / at.rate for at in self.rates)

    def least_excluded(self) -> float:
        """The number of served errors at which the mixture would reach 1 / alpha; all served if it cannot."""
        rates, served, errors = (np.array(column) for column in zip(*map(_row, self.rates), strict=True))
        bets = np.minimum(_BETS[:, None], _SHARES[:, None] * rates)
        growth = -np.log1p(-bets)
        wealth = np.log(_WEIGHTS / _WEIGHTS.sum()) + ((np.log1p(-bets / rates) + growth) * errors).sum(axis=1)
        # Lowest rate first: the mixture's logarithm after all answers served at it, and at the next, were wrong.
        growth, served = growth[:, ::-1], served[::-1]
        filled = wealth[:, None] + np.cumsum(growth * served, axis=1)
        target = -math.log(self.alpha)
        reached = np.flatnonzero(np.logaddexp.reduce(filled, axis=0) >= target)
        if not len(reached):
            return float(served.sum())
        at = int(reached[0])
        before = filled[:, at - 1] if at else wealth
        return float(served[:at].sum()) + _steps_to(target, before, growth[:, at])


def _row(at: AtRate) -> tuple[float, float, float]:
    return at.rate, at.served, at.errors


def _steps_to(target: float, wealth: NDArray[np.float64], growth: NDArray[np.float64]) -> float:
    """How often `growth` must be added until the sum of the exponentials reaches the target's.

    Newton's method from above: the logarithm of the sum is convex in the steps, so it stays above.
    """
    steps = float(((target - wealth) / growth).min())
    for _ in range(30):
        logs = wealth + growth * steps
        terms = np.exp(logs - logs.max())
        excess = float(logs.max() + np.log(terms.sum()) - target)
        if excess < 1e-6:
            break
        steps -= excess * float(terms.sum() / (terms * growth).sum())
    return max(steps, 0.0)
