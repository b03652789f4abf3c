"""What is told of the semantic cache's namespaces, by command line and gateway alike. It must not decide anything.

Certificates need numpy, which a process without the semantic cache may lack: then the counts are told without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from store.cache_reports import NamespaceReport

if TYPE_CHECKING:
    from pipeline.certify import Certified


def certificates(reports: Sequence[NamespaceReport]) -> list[Certified]:
    """The certificates of these namespaces. Raises ImportError where a library of the semantic cache is missing."""
    if not reports:
        return []
    from pipeline.certify import certified  # noqa: PLC0415  # numpy, only where there is a namespace

    return [certified(report) for report in reports]


def figures_of(report: NamespaceReport, found: Certified | None) -> dict[str, Any]:
    """A namespace's figures for JSON; without its certificate the state and the bound are None."""
    return {
        "namespace": report.id,
        "model": report.alias,
        "template": report.template,
        "state": None if found is None else found.state,
        "lookups": report.lookups,
        "hits": report.served,
        "share": round(report.served / report.lookups, 4) if report.lookups else 0.0,
        "error_bound": None if found is None else found.error_bound,
        "tokens_saved": report.saved_tokens,
        "audits": report.audits,
        "audit_tokens": report.audit_tokens,
        "entries": report.entries,
        "ttl_s": report.ttl_s,
    }


def bounds_of(report: NamespaceReport, found: Certified | None) -> dict[str, Any]:
    """What else a namespace's certificate states."""
    names = ("error_limit", "decision_bound", "decision_limit", "sentence", "audit_rate")
    return {
        **{name: None if found is None else getattr(found, name) for name in names},
        "worst_window": report.worst_window,
        "why": [] if found is None else found.why,
    }
