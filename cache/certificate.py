"""The certificate: how many answers served from the cache may have been other than the engine's, at every moment.

Each lookup draws a coin before it is scored. A lookup that would be served and whose coin says "audit" is run by the
engine instead, so that its error, if it is one, is seen and not served. Errors are arbitrary: nothing is assumed of
the order of lookups, of their likeness, or of the policy, which may change at any time. Only the coins are random.

For each error of a decision to serve, audited with probability p, and any g < p, the factor

    (1 - [audited] g / p) / (1 - g)

has expectation 1 given the past, so the product over all errors is a martingale, and so is a mixture of products for
several g. By Ville's inequality (1939) it stays below 1 / alpha for ever with probability 1 - alpha: with more errors
than `bound` says it would have passed that. This is a betting confidence sequence (Waudby-Smith and Ramdas, arXiv
2010.09686) for a total under Bernoulli audits (Ottoboni et al. 2019), whose bets are on unseen errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Final

ALPHA: Final = 0.05
# Audit rates: all evidence is the coin's, so a rate p needs some 3 / p lookups per percent before it allows a hit.
FIRST_RATE: Final = 0.4
STEADY_RATE: Final = 0.2
LEAST_RATE: Final = 0.02
FALLS_UNTIL: Final = 4_000  # from FIRST_RATE to STEADY_RATE
FALLS_AGAIN: Final = 13_000  # from STEADY_RATE on as 1 / lookups
# The mixture: g, and its weight before normalising. Large g pays while no error was seen, small g when many were.
_BETS: Final = (0.39, 0.3, 0.199, 0.15, 0.1, 0.07, 0.05, 0.03, 0.019, 0.01, 0.005)
_WEIGHTS: Final = (0.02, 0.02, 0.35, 0.15, 0.12, 0.1, 0.1, 0.08, 0.05, 0.05, 0.05)
_LARGEST_SHARE: Final = 0.995  # of the audit rate that a bet may be


def coin(secret: bytes, job: bytes) -> float:
    """The audit coin of a job, uniform in [0, 1): audited when below the rate. The same at every try of the job."""
    return int.from_bytes(blake2b(job, key=secret, digest_size=7).digest()) / 2**56


def audit_rate(lookups: int) -> float:
    """The rate that the coin is compared with after so many lookups of a version; never rises."""
    falling = FIRST_RATE * (FALLS_UNTIL * STEADY_RATE / FIRST_RATE) / max(lookups, 1)
    early = min(FIRST_RATE, max(STEADY_RATE, falling))
    return max(LEAST_RATE, min(early, STEADY_RATE * FALLS_AGAIN / max(lookups, 1)))


def alpha_of(version: int) -> float:
    """The share of ALPHA that a version has, from 1: the shares of all versions sum to ALPHA."""
    return 0.9 * ALPHA if version == 1 else 0.1 * ALPHA / ((version - 1) * version)


@dataclass(frozen=True, slots=True)
class Audit:
    """What the audits of one version have shown. `rate` is the smallest at which a lookup was audited.

    `log_wealth` has an entry for each bet: its weight and the factors of the audited errors.
    """

    alpha: float
    rate: float
    log_wealth: tuple[float, ...]
    errors: int = 0

    @classmethod
    def begin(cls, version: int, *, rate: float = FIRST_RATE) -> Audit:
        """No audit yet."""
        whole = sum(_WEIGHTS)
        return cls(alpha_of(version), rate, tuple(math.log(weight / whole) for weight in _WEIGHTS))

    def at_rate(self, rate: float) -> Audit:
        """The next lookups are audited at this rate; a higher one than before is not allowed for in the bound."""
        return replace(self, rate=min(self.rate, rate))

    def with_error(self, rate: float) -> Audit:
        """One more decision to serve that an audit, at the rate it was drawn with, found to be wrong."""
        return replace(self, errors=self.errors + 1, log_wealth=self._after(1.0, rate, at=self.rate))

    def bound(self) -> float:
        """At most so many wrong answers were served, with probability 1 - alpha at all moments at once.

        Each bet's weight of an error is the least that it had, that of the present rate.
        """
        return self._errors_below(self.log_wealth, self.rate) - self.errors

    def forecast(self, errors: float, *, rate: float, spread: float) -> float:
        """The bound after that many further errors, audited at `rate`, plus `spread` standard deviations of theirs."""
        expected = errors * rate
        seen = expected + spread * math.sqrt(expected)
        after = self._errors_below(self._after(seen, rate, at=min(rate, self.rate)), min(rate, self.rate))
        return after - self.errors - expected

    def _after(self, seen: float, rate: float, *, at: float) -> tuple[float, ...]:
        return tuple(
            wealth + seen * math.log1p(-g / rate) for wealth, g in zip(self.log_wealth, _bets(at), strict=True)
        )

    def _errors_below(self, log_wealth: Sequence[float], rate: float) -> float:
        """The least total of errors at which the mixture reaches 1 / alpha."""
        growth = [-math.log1p(-g) for g in _bets(rate)]
        target = -math.log(self.alpha)
        low, high = 0.0, min((target - wealth) / rise for wealth, rise in zip(log_wealth, growth, strict=True))
        for _ in range(40):
            middle = (low + high) / 2
            terms = [wealth + rise * middle for wealth, rise in zip(log_wealth, growth, strict=True)]
            most = max(terms)
            reached = most + math.log(sum(math.exp(term - most) for term in terms)) >= target
            low, high = (low, middle) if reached else (middle, high)
        return high


def _bets(rate: float) -> list[float]:
    return [min(g, _LARGEST_SHARE * rate) for g in _BETS]
