"""Commands about webhooks: which were sent and what came of it, and what receivers verify them with."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import click

from models.names import batch_hex, batch_name, short_name
from models.states import DeliveryState
from pipeline.webhooks import event_name, secret_text
from runtime.errors import BadInput, NotFound
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, opened_database
from scripts.terminal import emit, emit_json, emit_table, say
from store.batches import find_batches
from store.database import Session
from store.deliveries import PREVIOUS_SECRET_HOURS, DeliveryRow, deliveries_of, rotate_secret, webhook_secret

MOST_SHOWN = 1000

tenant_option = click.option("--tenant", default=TENANT, show_default=True, help="Whose; keys belong to one.")


@click.group()
def webhooks() -> None:
    """What tells of a batch's end: deliveries, and the secret that they are signed with."""


@webhooks.command("list")
@click.argument("batch", required=False)
@tenant_option
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def list_(settings: Settings, batch: str | None, tenant: str, as_json: bool) -> None:
    """The newest deliveries, or that of BATCH: where to, how often tried, what came of the last try."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        batch_id = None if batch is None else _batch_of(session, batch, tenant)
        rows = deliveries_of(session, tenant=tenant, batch_id=batch_id, limit=MOST_SHOWN)
    if as_json:
        emit_json([_figures(row) for row in rows])
    elif rows:
        emit_table("webhooks", ("batch", "end", "url", "state", "tries", "last try"), [_line(row) for row in rows])
    else:
        say("no webhook yet: none of the batches that ended had named one when it was created")


@webhooks.command()
@click.option("--rotate", is_flag=True, help="Make a new one first.")
@tenant_option
@click.pass_obj
def secret(settings: Settings, rotate: bool, tenant: str) -> None:
    """The secret that receivers verify webhooks with, such as `openai.OpenAI(webhook_secret=…)`."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        held = rotate_secret(session, tenant) if rotate else webhook_secret(session, tenant)
    emit(secret_text(held))
    if rotate:
        say(f"webhooks are signed with the earlier secret too for {PREVIOUS_SECRET_HOURS} hours")


def _batch_of(session: Session, name: str, tenant: str) -> UUID:
    found = find_batches(session, batch_hex(name), tenant=tenant)
    if not found:
        raise NotFound(f"{tenant} has no batch {name}; `stoker webhooks list` names those with webhooks")
    if len(found) > 1:
        raise BadInput(f"{name} is the beginning of several batches; write more of it")
    return found[0]


def _figures(row: DeliveryRow) -> dict[str, Any]:
    """As the gateway shows it."""
    return {
        "id": event_name(row.id),
        "batch": batch_name(row.batch_id),
        "url": row.url,
        "event": row.event,
        "state": row.state.value,
        "tries": row.tries,
        "status_code": row.status_code,
        "error": row.error,
        "created_at": _unix(row.created_at),
        "next_at": _unix(row.next_at) if row.state is DeliveryState.PENDING else None,
        "ended_at": _unix(row.ended_at),
    }


def _unix(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _line(row: DeliveryRow) -> tuple[object, ...]:
    last = row.error or ("" if row.status_code is None else f"answered {row.status_code}")
    if row.state is DeliveryState.PENDING:
        last = f"{last}{'; ' if last else ''}next at {row.next_at:%Y-%m-%d %H:%M:%S} UTC"
    return short_name(row.batch_id), row.event.removeprefix("batch."), row.url, row.state.value, row.tries, last
