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
from cache.pilot import PILOT_LOOKUPS

_ALARM_ODDS: Final = 1000.0  # were the fit right, the chance of an alarm before the next one would be 1 in this
_ALARM_TIMES: Final = 6.0  # the error rate among decisions, in times of the fitted one, that the alarm listens for


@dataclass(frozen=True, slots=True)
class Limits:
    """What the certificate states: wrong answers by all lookups, and by decisions to serve, the shadow's included."""

    error: float = 0.01
    served_error: float = 0.05


@dataclass(frozen=True, slots=True)
class Policy:
    """The state of one version of one namespace.

    `judged` counts lookups whose candidate the engine has judged; `decided` decisions to serve, those of the shadow
    too once they are judged; `shadow_errors` those of the shadow that were wrong. `rethink_at` and `next_fit` are in
    lookups.
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
    ended: str = ""  # why the version before it ended

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
        """The version after an alarm: cold, in the shadow, with a pilot of its own."""
        why = (
            f"version {self.version} was ended by a drift alarm after {self.lookups:,} lookups: "
            f"{self.alarm_errors:.0f} of {self.alarm_audits:.0f} audits since its last fit found errors"
        )
        return replace(Policy.begin(self.version + 1, self.limits), ended=why)

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
        """(Wrong answers by lookups, wrong decisions by decisions to serve), at most, at all moments at once."""
        bound = self.audit.bound()
        known = self.shadow_errors + self.audit.seen()
        return bound / max(1, self.lookups), (known + bound) / max(1, self.decided)

    def allowed(self, lookups: float, decided: float) -> float:
        """The wrong answers that both limits leave for serving, among so many lookups and decisions to serve.

        Decisions of the shadow and audited ones count for the second limit, with their errors, which are known.
        """
        known = self.shadow_errors + self.audit.seen()
        return min(self.limits.error * lookups, self.limits.served_error * decided - known)

    def most_wished(self, lookups: int, *, unsettled: int = 0) -> int:
        """Of the next so many lookups, decided before any of them is judged, at most so many may be served.

        Were all of those answers wrong, after a sudden drift that no audit has shown yet, and the `unsettled` ones too,
        which were served by shards whose audits are out, the expected errors would still be within the limits. In the
        shadow nothing is at stake.
        """
        if not self.is_serving:
            return lookups
        room = self.allowed(self.lookups + lookups, self.decided) - self.audit.expected() - unsettled
        return max(0, math.floor(room / (1 - self.rate)))

    def state(self) -> tuple[str, str]:
        """("pilot", "shadow", "serving" or "suspended", one sentence that says why)."""
        if not self.fits:
            seen = (
                f"{self.lookups:,} lookups of version {self.version} seen, the first fit comes after {PILOT_LOOKUPS:,}"
            )
            return "pilot", f"{seen}; {self.ended}" if self.ended else seen
        if self.is_serving:
            return "serving", "both bounds are within their limits"
        why = (
            "no threshold has few enough errors"
            if self.threshold is None
            else f"up to {self.audit.bound():.0f} wrong answers cannot be excluded, and the limits allow "
            f"{max(0.0, self.allowed(self.lookups, self.decided)):.0f} after {self.lookups:,} lookups and "
            f"{self.decided:,} decisions to serve, {self.shadow_errors:,} of them wrong in the shadow"
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
        """Whether the bound is within both, with room for one more error."""
        allowed = self.allowed(self.lookups, self.decided)
        return self.audit.bound() <= allowed and self.audit.expected() + 1 <= allowed
