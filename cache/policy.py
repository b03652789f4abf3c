"""When a namespace serves: pilot, threshold, limits, suspension. Pure: its owner keeps the state and the samples.

A version begins in the shadow: it decides, and the engine answers all the same. It serves from the moment when its
bounds are within the limits, and stops in the moment when they are not. Any rule may stand here: the certificate
counts what was decided, so a bad rule costs hits and never truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache.certificate import Audit, audit_rate
from cache.score import Floats, Scorer, cross_fitted, fit

PILOT_LOOKUPS: Final = 600
PILOT_SHARE: Final = 0.05
FIT_SAMPLES: Final = 6_000  # the newest; older ones had fewer entries to look at
_GRID: Final = tuple(9.0 - 0.25 * step for step in range(31))  # thresholds in log odds, strict to loose
_REFIT_GROWTH: Final = 1.25
_HORIZON: Final = 1.5  # the budget must last until so many times the present lookups
_SPREAD: Final = 1.0  # standard deviations of the audits' luck that the budget must hold
_SHARE_OF_SERVED_LIMIT: Final = 0.8
_SHARE_OF_LIMIT: Final = 0.9
_ALARM_ODDS: Final = 1000.0
_ALARM_TIMES: Final = 6.0  # the error rate among decisions, in times of the fitted one, that the alarm listens for


def pilot_size(lines: int) -> int:
    """Lines of a batch that run first, drawn uniformly, when their namespace is cold."""
    return min(lines, max(PILOT_LOOKUPS, math.ceil(PILOT_SHARE * lines)))


@dataclass(frozen=True, slots=True)
class Limits:
    """What the certificate states: wrong answers by all lookups, and by decisions to serve."""

    error: float = 0.01
    served_error: float = 0.05


@dataclass(frozen=True, slots=True)
class Samples:
    """Lookups whose decision the engine's answer has judged: one row each.

    `weights` are 1 / (probability that the engine ran it); `folds` halves them at random.
    """

    features: Floats
    agreed: NDArray[np.bool_]
    weights: Floats
    folds: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Policy:
    """The state of one version of one namespace.

    `decided` counts decisions to serve, in the shadow too; `shadow_errors` those of the shadow that were wrong.
    """

    version: int
    limits: Limits
    audit: Audit
    lookups: int = 0
    served: int = 0
    decided: int = 0
    shadow_errors: int = 0
    threshold: float | None = None
    expected_error: float = 0.0  # of a decision, as fitted
    alarm: float = 0.0  # log odds that decisions err more often than that
    next_fit: int = PILOT_LOOKUPS

    @classmethod
    def begin(cls, version: int, limits: Limits) -> Policy:
        """A version that has seen nothing."""
        return cls(version, limits, Audit.begin(version))

    @property
    def rate(self) -> float:
        """What the coins of the next lookups are compared with."""
        return min(self.audit.rate, audit_rate(self.lookups))

    @property
    def is_alarmed(self) -> bool:
        """Whether audits show more errors than the fit explains: serving is suspended until a new version."""
        return self.alarm > math.log(_ALARM_ODDS)

    @property
    def is_serving(self) -> bool:
        """Whether both bounds are within their limits at the rate that comes next."""
        bound = self.audit.at_rate(self.rate).bound()
        return (
            self.threshold is not None
            and not self.is_alarmed
            and bound <= self.limits.error * self.lookups
            and self.shadow_errors + bound <= self.limits.served_error * self.decided
        )

    def bounds(self) -> tuple[float, float]:
        """(Wrong answers by lookups, by decisions to serve), at most, with 95% at all moments at once."""
        bound = min(self.audit.bound(), float(self.served))
        return bound / max(1, self.lookups), (self.shadow_errors + bound) / max(1, self.decided)

    def after_lookups(self, lookups: int, *, decided: int, served: int) -> Policy:
        """So many lookups were decided under this state, at `rate`."""
        return replace(
            self,
            audit=self.audit.at_rate(self.rate),
            lookups=self.lookups + lookups,
            decided=self.decided + decided,
            served=self.served + served,
        )

    def after_shadow(self, *, agreed: bool) -> Policy:
        """A decision of the shadow was judged by the engine's answer."""
        return self if agreed else replace(self, shadow_errors=self.shadow_errors + 1)

    def after_audit(self, *, agreed: bool, rate: float) -> Policy:
        """An audited decision was judged by the engine's answer; `rate` is that of its own lookup."""
        expected = min(max(self.expected_error, 0.002), 0.1)
        odds = _ALARM_TIMES if not agreed else (1 - _ALARM_TIMES * expected) / (1 - expected)
        alarm = self.alarm if self.is_alarmed else max(0.0, self.alarm + math.log(odds))
        return replace(self, alarm=alarm, audit=self.audit if agreed else self.audit.with_error(rate))

    def with_threshold(self, samples: Samples, scores: Floats) -> Policy:
        """The loosest threshold of the grid up to which each one's errors fit into what the bounds leave.

        `scores` are cross-fitted. Strict to loose, stopping at the first that does not fit.
        """
        start = max(float(self.lookups), self.audit.bound() / self.limits.error)
        end = _HORIZON * start
        rate = min(self.audit.rate, audit_rate(int(end)))
        whole = float(samples.weights.sum())
        threshold, expected = None, 0.0
        for tried in _GRID:
            taken = scores >= tried
            error = float(samples.weights[taken & ~samples.agreed].sum()) / whole
            decided = float(samples.weights[taken].sum()) / whole
            forecast = self.audit.forecast(error * (end - start), rate=rate, spread=_SPREAD)
            if (
                forecast > self.limits.error * end
                or error > _SHARE_OF_LIMIT * self.limits.error
                or error > _SHARE_OF_SERVED_LIMIT * self.limits.served_error * decided
            ):
                break
            threshold, expected = tried, error / max(decided, 1e-9)
        return replace(self, threshold=threshold, expected_error=expected)

    def fitted(self, samples: Samples) -> tuple[Policy, Scorer, Floats]:
        """The next fit, its scorer, and the cross-fitted scores by which thresholds are chosen until the one after."""
        scores = cross_fitted(samples.features, samples.agreed, samples.weights, samples.folds)
        scorer = fit(samples.features, samples.agreed, samples.weights)
        policy = replace(self.with_threshold(samples, scores), next_fit=math.ceil(self.lookups * _REFIT_GROWTH))
        return policy, scorer, scores


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one lookup: served with the neighbours' answer, or run; `audited` runs judge the decision."""

    score: float
    is_wished: bool
    is_served: bool
    audited: bool


def decide(policy: Policy, scores: Floats, coins: Floats, servable: Sequence[bool]) -> list[Decision]:
    """One decision for each lookup of a shard, all under the same state; `servable`: the guards let it through."""
    threshold, rate, serving = policy.threshold, policy.rate, policy.is_serving
    decisions = []
    for score, coin, allowed in zip(scores.tolist(), coins.tolist(), servable, strict=True):
        wished = allowed and threshold is not None and score >= threshold
        audited = wished and serving and coin < rate
        decisions.append(Decision(score, wished, wished and serving and not audited, audited))
    return decisions
