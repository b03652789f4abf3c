"""Which threshold a version decides by. Any rule may stand here: a bad one costs hits and never truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from cache.certificate import audit_rate
from cache.model import Model
from cache.policy import Policy

RETHINK_LOOKUPS: Final = 256  # how often the threshold is chosen anew between fits
_GRID: Final = tuple(9.0 - 0.25 * step for step in range(31))  # thresholds in log odds, strict to loose
_HORIZON: Final = 1.5  # the budget must last until so many times the present lookups
_SPREAD: Final = 1.0  # standard deviations of the audits' luck that the budget must hold
_SHARE_OF_SERVED_LIMIT: Final = 0.8
_SHARE_OF_LIMIT: Final = 0.9


def rethought(policy: Policy, model: Model) -> Policy:
    """The policy with the loosest threshold of the grid up to which each one's errors fit into what the bounds leave.

    Strict to loose, stopping at the first that does not fit.
    """
    start = max(float(policy.lookups), policy.audit.bound() / policy.limits.error)
    end = _HORIZON * start
    rate = min(policy.audit.rate, audit_rate(int(end)))
    whole = float(model.weights.sum())
    threshold, expected = None, 0.0
    for tried in _GRID:
        taken = model.scores >= tried
        error = float(model.weights[taken & ~model.agreed].sum()) / whole
        decided = float(model.weights[taken].sum()) / whole
        forecast = policy.audit.forecast(error * (end - start), rate=rate, spread=_SPREAD)
        if (
            forecast > policy.limits.error * end
            or error > _SHARE_OF_LIMIT * policy.limits.error
            or error > _SHARE_OF_SERVED_LIMIT * policy.limits.served_error * decided
        ):
            break
        threshold, expected = tried, error / max(decided, 1e-9)
    return replace(policy, threshold=threshold, expected_error=expected, rethink_at=policy.lookups + RETHINK_LOOKUPS)
