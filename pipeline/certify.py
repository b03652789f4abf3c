"""What a namespace's certificate says, in words and figures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from cache.policy import Policy
from store.cache_reports import NamespaceReport

LEAST_TWICE = 50  # jobs asked twice below which nothing is said of them
MOSTLY = 0.5


@dataclass(frozen=True, slots=True)
class Certified:
    """A namespace's state and why; shares are between 0 and 1, None while nothing is known of them.

    `error_bound` (of lookups) and `decision_bound` (of decisions to serve) hold with 95% at all moments at once;
    `worst_window` is an estimate.
    """

    namespace: int
    alias: str
    template: str
    state: str
    why: list[str]
    sentence: str
    version: int
    lookups: int
    settled: int
    served: int
    entries: int
    ttl_s: float | None
    decided: int
    error_bound: float
    error_limit: float
    decision_bound: float
    decision_limit: float
    worst_window: float
    threshold: float | None
    audit_rate: float
    asked_twice: int
    self_disagreement: float | None

    @property
    def at_most(self) -> str:
        """The share of wrong answers in lookups, at most; of a namespace that has served nothing there is none."""
        return _at_most(self.error_bound) if self.served else "-"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def certified(report: NamespaceReport) -> Certified:
    """The certificate over the lookups whose audits have come back: those before the first that has not."""
    policy = Policy.decode(report.policy)
    settled = policy.lookups if report.settled is None else min(report.settled, policy.lookups)
    state, why = policy.state()
    if _is_free(report):
        state, why = "shadow", "free text is never served"
    decided = policy.decided if report.settled_decided is None else min(report.settled_decided, policy.decided)
    bounds = replace(policy, lookups=settled, decided=decided).bounds() if settled else (0.0, 0.0)
    disagreement = report.differed / report.asked_twice if report.asked_twice >= LEAST_TWICE else None
    return Certified(
        namespace=report.id,
        alias=report.alias,
        template=report.template,
        state=state,
        why=[why, *_reasons(report, policy, disagreement)],
        sentence=_sentence(report, policy, f"{settled:,} lookups", f"{decided:,} decisions to serve", bounds),
        version=policy.version,
        lookups=policy.lookups,
        settled=settled,
        served=policy.served,
        entries=report.entries,
        ttl_s=report.ttl_s,
        decided=decided,
        error_bound=bounds[0],
        error_limit=policy.limits.error,
        decision_bound=bounds[1],
        decision_limit=policy.limits.served_error,
        worst_window=report.worst_window,
        threshold=policy.threshold,
        audit_rate=policy.rate,
        asked_twice=report.asked_twice,
        self_disagreement=disagreement,
    )


def _sentence(
    report: NamespaceReport, policy: Policy, lookups: str, decisions: str, bounds: tuple[float, float]
) -> str:
    since = f"Since version {policy.version} of this policy began" + (
        f" ({report.began_at:%Y-%m-%d})" if policy.version == 1 else ""
    )
    if not policy.served:
        return f"{since}, none of {policy.lookups:,} lookups was served from the cache."
    limits = policy.limits
    return (
        f"{since}, at most {_at_most(bounds[0])} of {lookups} (limit {limits.error:.1%}) were answered otherwise "
        f"than the engine would have, and at most {_at_most(bounds[1])} of {decisions} (limit "
        f"{limits.served_error:.1%}; those in the shadow and audited ones, where the engine answered, are among them) "
        "were wrong, with 95% confidence at all moments at once. That is the cumulative share, not every window: of "
        f"the worst 1,000 of the lookups still kept {report.worst_window:.2%} were, as their audits suggest."
    )


def _at_most(share: float) -> str:
    """A bound in percent, rounded up."""
    return f"{math.ceil(share * 10_000) / 100:.2f}%"


def _reasons(report: NamespaceReport, policy: Policy, disagreement: float | None) -> list[str]:
    found = []
    if disagreement is not None and disagreement > policy.limits.error / 2:
        found.append(
            f"the engine disagrees with itself: asked twice, {report.differed} of {report.asked_twice} answers "
            f"differed ({disagreement:.1%}, over half of the limit, {policy.limits.error:.1%}); no cache can do better"
        )
    if _is_free(report):
        found.append(
            f"{report.free_answers:,} of {report.answers:,} answers are free text, which stays in the shadow; "
            "ask for a label, a number or JSON, or use --cache exact"
        )
    return found


def _is_free(report: NamespaceReport) -> bool:
    return report.free_answers > MOSTLY * report.answers
