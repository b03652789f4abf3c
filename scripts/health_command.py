"""`stoker health`: whether one process of Stoker does its work, for the healthchecks of containers.

It asks what that process itself has to show and nothing else: `stoker doctor` looks at the whole system. Dispatch has
nothing of its own to show: for it is asked whether any process leads and is not silent. A container asks every half
minute, so each part imports what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from http import HTTPStatus

import click

from runtime.errors import ServiceUnreachable
from runtime.local_http import status_of
from runtime.settings import Settings
from scripts.terminal import say

ANSWER_S = 5.0


@click.command()
@click.argument("part", type=click.Choice(["worker", "dispatch", "gateway", "flower"]))
@click.pass_obj
def health(settings: Settings, part: str) -> int:
    """Whether the worker, dispatcher, gateway or Flower of this machine is healthy.

    Exit codes: 0 it is, 1 it is not, 3 a service is unreachable. A worker is healthy once its engine answers; dispatch
    while somebody leads, on this machine or another.
    """
    fault = _FAULTS[part](settings)
    if fault is not None:
        say(f"stoker: {fault}")
    return 0 if fault is None else 1


def worker_fault(settings: Settings) -> str | None:
    """What is wrong with this machine's workers of the settings' node, as they announce themselves in Redis."""
    from store.presence import PresenceBoard  # noqa: PLC0415

    node, machine = settings.worker.node, os.uname().nodename
    board = PresenceBoard(_connected(settings).require_redis())
    try:
        here = [worker for worker in board.workers(node=node) if worker.name.endswith(f"@{machine}")]
    finally:
        board.close()
    if not here:
        return f"no worker of the node {node} on {machine} has announced itself: it starts, or does not go on"
    if any(worker.healthy for worker in here):
        return None
    return f"the engine of {here[0].name} does not answer: see its log; it restarts by itself"


def dispatch_fault(settings: Settings) -> str | None:
    """What is wrong with dispatch: that nobody leads. One that stands by is healthy, and tells nothing of itself.

    A leader that is silent is ended by those that stand by, so the lock is held by one that does its work.
    """
    from scripts.lookup import opened_database  # noqa: PLC0415
    from store.health import has_dispatch_leader  # noqa: PLC0415

    with opened_database(_connected(settings)) as database, database.transaction() as session:
        return None if has_dispatch_leader(session) else "nobody leads: the dispatcher starts, or does not go on"


def gateway_fault(settings: Settings) -> str | None:
    """What is wrong with the gateway; raises ServiceUnreachable if it answers that it reaches no Postgres."""
    status = status_of(settings.gateway.host, settings.gateway.port, "/healthz", timeout_s=ANSWER_S)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        raise ServiceUnreachable("the gateway answers, but does not reach Postgres")
    return _fault_of("the gateway", status)


def flower_fault(settings: Settings) -> str | None:
    """What is wrong with Flower."""
    return _fault_of(
        "Flower", status_of(settings.flower.host, settings.flower.port, "/healthcheck", timeout_s=ANSWER_S)
    )


def _connected(settings: Settings) -> Settings:
    if not settings.is_embedded:
        return settings
    from scripts.local import connected  # noqa: PLC0415

    return connected(settings)


def _fault_of(name: str, status: int | None) -> str | None:
    if status == HTTPStatus.OK:
        return None
    return f"{name} does not answer" if status is None else f"{name} answers {status}"


_FAULTS: dict[str, Callable[[Settings], str | None]] = {
    "worker": worker_fault,
    "dispatch": dispatch_fault,
    "gateway": gateway_fault,
    "flower": flower_fault,
}
