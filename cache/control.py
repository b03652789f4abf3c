"""Which threshold and audit rate a version goes on with. Any rule may stand here: a bad one costs hits, never truth.

Both are chosen by what has been judged so far, never by a coin that is still to be looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from cache.certificate import RATES
from cache.model import Model
from cache.policy import Policy

RETHINK_LOOKUPS: Final = 256  # how often both are chosen anew between fits
_GRID: Final = np.array([9.0 - 0.25 * step for step in range(33)])  # thresholds in log odds, strict to loose
_STEPS_DOWN: Final = 1  # that the audit rate may fall at once; 2 gave a point less
# Both bounds must hold at each of these times the present lookups, with so many standard deviations of bad luck.
# Simulated on BANKING77: a spread of 0.5 to 1.5, and thresholds chosen twice as often, change hits by a point.
_HORIZONS: Final = (1.1, 1.5)
_SPREAD: Final = 1.0
_UNSEEN_YET: Final = 1.0  # errors added to those of the samples: none among few does not mean none
_HALF_A_ROW: Final = 0.5  # audited errors below which luck is not counted in standard deviations
_SHARE_OF_LIMIT: Final = 0.9
_SHARE_OF_SERVED_LIMIT: Final = 0.5
_SHARE_IN_NEED: Final = 0.5


@dataclass(frozen=True, slots=True)
class _Choice:
    """Shares of all lookups that would be wished, and wrong, at one threshold."""

    threshold: float
    wished: float
    wrong: float


def rethought(policy: Policy, model: Model) -> Policy:
    """The policy with the threshold and the rate that promise most hits within what the limits leave.

    With nothing to spare the rate stays, and the threshold is one whose errors are half of what lookups allow.
    """
    choices = _choices(policy, model)
    at = RATES.index(policy.rate) if policy.rate in RATES else len(RATES) - 1
    best, rate, hits = _in_need(policy, choices), policy.rate, 0.0
    for tried in RATES[at : at + 1 + _STEPS_DOWN]:
        found = _loosest(policy, choices, tried)
        if found is not None and found.wished * (1 - tried) > hits:
            best, rate, hits = found, tried, found.wished * (1 - tried)
    return replace(
        policy,
        audit=policy.audit.at_rate(rate),
        threshold=None if best is None else best.threshold,
        expected_error=0.0 if best is None else best.wrong / best.wished,
        rethink_at=policy.lookups + RETHINK_LOOKUPS,
    )


def _choices(policy: Policy, model: Model) -> list[_Choice]:
    """Strict to loose, up to the first whose errors alone pass a limit."""
    whole = float(model.weights.sum())
    choices = []
    for threshold in _GRID.tolist():
        taken = model.scores >= threshold
        wished = float(model.weights[taken].sum()) / whole
        wrong = (float(model.weights[taken & ~model.agreed].sum()) + _UNSEEN_YET) / whole
        if wrong > _SHARE_OF_LIMIT * policy.limits.error:
            break
        if wrong <= _SHARE_OF_SERVED_LIMIT * policy.limits.served_error * wished:
            choices.append(_Choice(threshold, wished, wrong))
    return choices


def _in_need(policy: Policy, choices: list[_Choice]) -> _Choice | None:
    cautious = [choice for choice in choices if choice.wrong <= _SHARE_IN_NEED * policy.limits.error]
    return cautious[-1] if cautious else None


def _loosest(policy: Policy, choices: list[_Choice], rate: float) -> _Choice | None:
    """The loosest choice within the limits at all horizons; more errors never forecast less, so by bisection."""
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high) // 2
        if all(_holds(policy, choices[middle], rate, horizon) for horizon in _HORIZONS):
            low = middle + 1
        else:
            high = middle
    return choices[low - 1] if low else None


def _holds(policy: Policy, choice: _Choice, rate: float, horizon: float) -> bool:
    """Whether the forecast bound is within the limits after so many times the lookups until serving may go on."""
    begin = max(float(policy.lookups), policy.audit.bound() / policy.limits.error)
    more = (horizon - 1) * begin
    served = more * choice.wished * (1 - rate)
    seen = more * choice.wrong * rate
    seen += _SPREAD * math.sqrt(seen + _HALF_A_ROW)
    audit = policy.audit.at_rate(rate).with_served(served).with_errors(seen, rate)
    later = replace(policy, audit=audit)
    return audit.least_excluded() <= later.allowed(begin + more, policy.decided + more * choice.wished)
