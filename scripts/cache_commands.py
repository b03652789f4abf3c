"""Commands about the cache: stats, clear."""

from __future__ import annotations

import click

from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, opened_database
from scripts.terminal import emit_json, emit_table, say
from store.answers import cache_totals, raise_epoch


@click.group()
def cache() -> None:
    """Answers that were given before: what they save, and making them old."""


@cache.command()
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def stats(settings: Settings, as_json: bool) -> None:
    """Answers kept, and what the batches that are still there took from them."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        totals = cache_totals(session, TENANT)
    figures = {
        "entries": totals.entries,
        "jobs": totals.jobs,
        "from_cache": totals.served,
        "share": round(totals.served / totals.jobs, 4) if totals.jobs else 0.0,
        "tokens_saved": totals.saved_tokens,
    }
    if as_json:
        emit_json(figures)
    else:
        emit_table("cache", ("figure", "value"), list(figures.items()))


@cache.command()
@click.pass_obj
def clear(settings: Settings) -> None:
    """Make every answer of before old: equal requests run again. Results stay."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        gone = raise_epoch(session, TENANT)
    say(f"{gone:,} answers are forgotten; batches go on without them")
