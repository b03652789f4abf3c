"""`stoker purge`: ended batches go before the retention lets them go."""

from __future__ import annotations

import click

from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, opened_database
from scripts.submit_options import Window
from scripts.terminal import emit_json, say
from store.retention import MARKED_AT_ONCE, count_past, mark_deleted


@click.command()
@click.option("--older-than", "age_s", type=Window(), required=True, help="Those that ended so long ago, e.g. 30d.")
@click.option("--tenant", default=TENANT, show_default=True, help="Whose.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def purge(settings: Settings, age_s: float, tenant: str, dry_run: bool, as_json: bool) -> None:
    """Delete batches that ended long ago, with their jobs and results; it cannot be undone.

    They are out of sight at once; the dispatcher frees their space half an hour later, in small steps. Batches that
    have not ended stay, and what a batch gave the cache stays too.
    """
    with opened_database(connected(settings)) as database:
        if dry_run:
            with database.transaction() as session:
                count = count_past(session, retention_s=age_s, tenant=tenant)
        else:
            count, marked = 0, MARKED_AT_ONCE
            while marked == MARKED_AT_ONCE:
                with database.transaction() as session:
                    marked = mark_deleted(session, retention_s=age_s, tenant=tenant)
                count += marked
    if as_json:
        emit_json({"batches": count, "dry_run": dry_run})
        return
    batches = f"{count:,} batch{'' if count == 1 else 'es'}"
    say(f"{batches} would be deleted" if dry_run else f"{batches} deleted")
