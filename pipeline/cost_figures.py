"""A report of costs as plain values: what `stoker cost --json`, the gateway and manifests say."""

from __future__ import annotations

from typing import Any

from models.money import money
from pipeline.costs import Comparison, CostLine, CostReport, EngineUse, Group, cost_report
from pipeline.ledger import Ledger, engine_name
from runtime.settings import CostSettings


def figures_of(report: CostReport) -> dict[str, Any]:
    """All of it; money in the currency's unit."""
    return {
        "by": report.by.value,
        "currency": report.currency,
        "lines": [line_figures(line) for line in report.lines],
        "total": line_figures(report.total),
        "engines": [_use_figures(use) for use in report.engines],
        "comparison": None if report.comparison is None else _comparison_figures(report.comparison),
        "sentence": report.sentence,
    }


def line_figures(line: CostLine) -> dict[str, Any]:
    """One line."""
    return {
        "name": line.name,
        "jobs": line.jobs,
        "tokens_in": line.prompt_tokens,
        "tokens_out": line.completion_tokens,
        "tokens_in_cached": line.cached_tokens,
        "cost": money(line.cost),
        "billed": money(line.billed),
        "own": money(line.own),
        "managed": None if line.managed is None else money(line.managed),
        "jobs_without_price": line.unpriced,
    }


def endpoint_figures(ledger: Ledger) -> list[dict[str, Any]]:
    """What each engine or endpoint did of a batch: `cost` where it bills tokens."""
    report = cost_report(ledger, by=Group.ENDPOINT, cost=CostSettings())
    currencies = {
        engine_name(engine, engine.id): engine.description.get("currency", report.currency)
        for engine in ledger.engines.values()
        if engine.description.get("kind") == "endpoint"
    }
    return [
        {
            "name": line.name,
            "jobs": line.jobs,
            "tokens_in": line.prompt_tokens,
            "tokens_out": line.completion_tokens,
            "tokens_in_cached": line.cached_tokens,
            "cost": {"amount": money(line.billed), "currency": currencies[line.name]} if line.billed else None,
        }
        for line in report.lines
    ]


def _use_figures(use: EngineUse) -> dict[str, Any]:
    return {
        "name": use.name,
        "hours": round(use.hours, 4),
        "busy": _share(use.busy),
        "slots": _share(use.slots),
        "gpu": _share(use.gpu),
        "cost": None if use.cost is None else money(use.cost),
    }


def _comparison_figures(found: Comparison) -> dict[str, Any]:
    return {
        "own": money(found.own),
        "managed": money(found.managed),
        "tokens": found.tokens,
        "utilisation": _share(found.utilisation),
        "break_even": _share(found.break_even),
    }


def _share(share: float | None) -> float | None:
    return None if share is None else round(share, 4)
