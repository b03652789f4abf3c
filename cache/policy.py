"""The state of a namespace: pilot, shadow, serving, suspension. Small, immutable, kept as text by its owner.

A version begins in the shadow: it decides, and the engine answers all the same. It serves from the moment when its
bounds are within the limits, and stops in the moment when they are not. A drift alarm ends a version: the next one
begins as if it had seen nothing, with its own share of alpha and its own statement, so that all versions' statements
together hold with 95%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from cache.certificate import Audit

PILOT_LOOKUPS: Final = 600
PILOT_SHARE: Final = 0.05
LEAST_SHARE: Final = 0.75  # of the first limit that the second leaves; 0.5 costs four points of hits
_ALARM_ODDS: Final = 1000.0  # were the fit right, the chance of an alarm before the next one would be 1 in this
_ALARM_TIMES: Final = 6.0  # the error rate among decisions, in times of the fitted one, that the alarm listens for


def pilot_size(lines: int) -> int:
    """Lines of a batch that run first, drawn uniformly, when their namespace is cold."""
    return min(lines, max(PILOT_LOOKUPS, math.ceil(PILOT_SHARE * lines)))


@dataclass(frozen=True, slots=True)
class Limits:
    """What the certificate states: wrong answers by all lookups, and by served ones."""

    error: float = 0.01
    served_error: float = 0.05


@dataclass(frozen=True, slots=True)
class Policy:
    """The state of one version of one namespace.

    `judged` counts lookups whose candidate the engine has judged; `decided` decisions to serve, in the shadow too;
    `shadow_errors` those of the shadow that were wrong. `rethink_at` and `next_fit` are in lookups.
    """

    version: int
    limits: Limits
    audit: Audit
    lookups: int = 0
    judged: int = 0
    served: int = 0
    decided: int = 0
    shadow_errors: int = 0
    fits: int = 0
    threshold: float | None = None
    expected_error: float = 0.0  # of a decision, as fitted
    alarm_audits: int = 0  # since the last fit
    alarm_errors: int = 0
    next_fit: int = PILOT_LOOKUPS
    rethink_at: int = 0

    @classmethod
    def begin(cls, version: int, limits: Limits) -> Policy:
        """A version that has seen nothing; the first is 1."""
        return cls(version, limits, Audit.begin(version))

    @classmethod
    def decode(cls, text: str) -> Policy:
        """What `encode` wrote, by this or an older release. Raises msgspec.DecodeError for anything else."""
        return msgspec.json.decode(text, type=cls)

    def encode(self) -> str:
        """As JSON."""
        return msgspec.json.encode(self).decode()

    def next_version(self) -> Policy:
        """The version after an alarm or a clearing: cold, in the shadow, with a pilot of its own."""
        return Policy.begin(self.version + 1, self.limits)

    @property
    def rate(self) -> float:
        """What the coins of the next lookups are compared with."""
        return self.audit.rate

    @property
    def is_alarmed(self) -> bool:
        """Whether audits since the last fit show more errors than the fit explains: the version must end."""
        expected = min(max(self.expected_error, 0.002), 0.1)
        against = math.log((1 - _ALARM_TIMES * expected) / (1 - expected))
        odds = self.alarm_errors * math.log(_ALARM_TIMES) + (self.alarm_audits - self.alarm_errors) * against
        return odds > math.log(_ALARM_ODDS)

    @property
    def is_serving(self) -> bool:
        """Whether both bounds are within their limits at the rate that comes next."""
        return self.threshold is not None and not self.is_alarmed and self._is_within_limits()

    def bounds(self) -> tuple[float, float]:
        """(Wrong answers by lookups, by served ones), at most, with this version's alpha at all moments at once."""
        bound = self.audit.bound()
        return bound / max(1, self.lookups), bound / max(1, self.served)

    def allowed(self, lookups: float, served: float) -> float:
        """The wrong answers that both limits allow among so many lookups and served answers.

        The second limit gives way to LEAST_SHARE of the first: a suspended version serves no more, so a limit of
        served answers alone would never let it come back.
        """
        of_lookups = self.limits.error * lookups
        return min(of_lookups, max(self.limits.served_error * served, LEAST_SHARE * of_lookups))

    def most_wished(self, lookups: int) -> int:
        """Of the next so many lookups, decided before any of them is judged, at most so many may be served.

        Were all of those answers wrong, after a sudden drift that no audit has shown yet, the expected errors would
        still be within the limits.
        """
        room = self.allowed(self.lookups + lookups, self.served) - self.audit.expected()
        return max(0, math.floor(room / (1 - self.rate)))

    def state(self) -> tuple[str, str]:
        """("pilot", "shadow", "serving" or "suspended", one sentence that says why)."""
        if not self.fits:
            return "pilot", f"{self.lookups:,} of {PILOT_LOOKUPS:,} lookups of version {self.version} seen"
        if self.is_serving:
            share, of_served = self.bounds()
            return (
                "serving",
                f"at most {share:.2%} of {self.lookups:,} lookups and {of_served:.2%} of {self.served:,} served ones "
                f"were answered wrongly",
            )
        why = (
            "no threshold has few enough errors"
            if self.threshold is None
            else f"up to {self.audit.bound():.0f} wrong answers cannot be excluded, and {self.limits.error:.1%} of "
            f"{self.lookups:,} lookups are {self.limits.error * self.lookups:.0f}"
        )
        return ("suspended" if self.served else "shadow"), why

    def after_lookups(self, lookups: int, *, decided: int, served: int) -> Policy:
        """So many lookups were decided under this state, at `rate`."""
        return replace(
            self,
            audit=self.audit.with_served(served),
            lookups=self.lookups + lookups,
            decided=self.decided + decided,
            served=self.served + served,
        )

    def _is_within_limits(self) -> bool:
        bound = self.audit.bound()
        return bound <= self.allowed(self.lookups, self.served)
