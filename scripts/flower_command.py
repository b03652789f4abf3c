"""Flower, Celery's dashboard: `stoker flower`, and the one that `stoker up` keeps beside itself."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from runtime.errors import BadInput, extra_remedy
from runtime.kept_process import KeptProcess
from runtime.settings import Settings, environment_of
from scripts.embedded import free_port, is_answering
from scripts.local import LONGEST_PAUSE_S, connected, home_of

MODULE = "worker.flower"
PASSWORD_BYTES = 16
GRACE_S = 5.0  # of a process that holds nothing


@click.command()
@click.pass_obj
def flower(settings: Settings) -> None:
    """Run Flower: workers, tasks and queues, live in a browser. It needs STOKER_FLOWER__PASSWORD.

    Whoever enters can stop workers: leave it on loopback, or put a TLS proxy with a login of its own before it.
    `stoker up` has one already.
    """
    if not has_flower():
        raise BadInput(f"Flower is missing: {extra_remedy('flower')}")
    served = connected(settings)
    password = served.flower.password or _kept_password(served)
    if password is None:
        raise BadInput("Flower needs a password: set STOKER_FLOWER__PASSWORD; `stoker up` makes one itself")
    host, port = served.flower.host, served.flower.port
    if port and is_answering(host, port):
        raise BadInput(f"port {port} of {host} is taken: set STOKER_FLOWER__PORT to another")
    os.execve(sys.executable, [sys.executable, "-m", MODULE], _environment(served, password, port))  # noqa: S606


def has_flower() -> bool:
    """Whether its library is there."""
    return importlib.util.find_spec("flower") is not None


@contextmanager
def local_flower(settings: Settings) -> Iterator[str]:
    """Keep Flower running in this block; gives what is to be said of it.

    It is not waited for, and what happens to it harms nothing: it is only for looking.
    """
    host, wished = settings.flower.host, settings.flower.port
    port = wished if not is_answering(host, wished) else free_port(host)
    log = home_of(settings) / "logs" / "flower.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    password, known = settings.flower.password, "with the password that is set"
    if password is None:
        password, known = _made_password(settings), f"its password is in {_password_file(settings)}"
    environment = _environment(settings, password, port)
    with KeptProcess(
        MODULE, name="flower", env=environment, grace_s=GRACE_S, log_file=log, longest_pause_s=LONGEST_PAUSE_S
    ):
        yield f"Flower: http://{host}:{port}/ as {settings.flower.user}; {known}\n"


def _environment(settings: Settings, password: str, port: int) -> dict[str, str]:
    flower = settings.flower.model_copy(update={"password": password, "port": port})
    return {**os.environ, **environment_of(settings.model_copy(update={"flower": flower}))}


def _password_file(settings: Settings) -> Path:
    return home_of(settings) / "flower-password"


def _kept_password(settings: Settings) -> str | None:
    try:
        return _password_file(settings).read_text().strip() or None
    except FileNotFoundError:
        return None


def _made_password(settings: Settings) -> str:
    """The password that an earlier `stoker up` made, or a new one, readable by its owner alone."""
    kept = _kept_password(settings)
    if kept is not None:
        return kept
    made = secrets.token_urlsafe(PASSWORD_BYTES)
    file = _password_file(settings)
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(made + "\n")
    return made
