"""Commands about processes and services: worker, dispatch, up, migrate, doctor."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import click

from pipeline.keys import ensure_first_key
from runtime.errors import BadInput
from runtime.logs import configure_logs
from runtime.settings import Settings, environment_of
from scripts.embedded import is_answering
from scripts.local import (
    LocalProcess,
    connected,
    gateway_environment,
    has_gateway_parts,
    has_reading_parts,
    has_semantic_parts,
    home_of,
    local_gateway,
    local_services,
    local_worker,
    prepare_schema,
)
from scripts.lookup import opened_database
from scripts.terminal import bar, emit_json, emit_table, say
from worker.dispatcher import run_dispatcher
from worker.doctor import examine

EXIT_UNREACHABLE = 3


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--node",
    type=click.Choice(["generation", "documents"]),
    help="generation: an engine and its batches; documents: reading documents. Default: STOKER_WORKER__NODE.",
)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def worker(settings: Settings, node: str | None, celery_options: tuple[str, ...]) -> None:
    """Run a worker with its engine: short for `celery -A worker.main worker`; options go to Celery."""
    served = connected(settings)
    environment = {**os.environ, **environment_of(served)} | ({"STOKER_WORKER__NODE": node} if node else {})
    command = [sys.executable, "-m", "celery", "-A", "worker.main", "worker", *celery_options]
    os.execve(sys.executable, command, environment)  # noqa: S606  # the worker takes this process's place


@click.command()
@click.pass_obj
def dispatch(settings: Settings) -> None:
    """Run a dispatch loop: leads, or stands by while another one leads. Every worker has one too."""
    configure_logs(settings.log)
    run_dispatcher(connected(settings))


@click.command()
@click.pass_obj
def up(settings: Settings) -> None:
    """Run everything on this machine until Ctrl-C: Postgres, Valkey, a worker with its engine, dispatch, the gateway.

    Chroma too, if the semantic cache can work here. Other commands in other terminals find them by themselves.
    """
    with_chroma = settings.is_embedded and has_semantic_parts(settings)
    if settings.is_embedded and not with_chroma:
        say(f"without Chroma: the semantic cache needs its libraries and an embedder in {settings.cache.embedder}")
    with local_services(settings, with_chroma=with_chroma) as served:
        prepare_schema(served)
        with ExitStack() as stack:
            with bar("starting the engine", total=None) as show:
                started = [stack.enter_context(local_worker(served, on_wait=show))]
            if has_reading_parts(served):
                started.append(stack.enter_context(local_worker(served, name="documents", node="documents")))
            page = _start_gateway(served, stack, started)
            stack.callback(say, "stopping")
            say(
                f"up; logs in {home_of(settings) / 'logs'} ({', '.join(one.log.name for one in started)})\n{page}"
                "submit from another terminal: stoker submit FILE.jsonl; stop with Ctrl-C"
            )
            _wait_for_signal(started)


def _start_gateway(settings: Settings, stack: ExitStack, started: list[LocalProcess]) -> str:
    """Start the gateway if it can run here; what is to be said of it."""
    host, port = settings.gateway.host, settings.gateway.port
    if not has_gateway_parts():
        return "no gateway and no page: their libraries are missing (pip install 'stoker[gateway]')\n"
    if is_answering(host, port):
        return f"no gateway and no page: port {port} is taken; set STOKER_GATEWAY__PORT to another\n"
    file = home_of(settings) / "key"
    with opened_database(settings) as database:
        key = ensure_first_key(database, file)
    started.append(stack.enter_context(local_gateway(settings)))
    known = f"its key is in {file}" if key else "make a key for it with `stoker keys create`"
    return f"page: http://{host}:{port}/ and API: http://{host}:{port}/v1; {known}\n"


@click.command()
@click.pass_obj
def gateway(settings: Settings) -> None:
    """Run the HTTP door: the OpenAI-compatible API and the page, with the validators behind it.

    Keys are made with `stoker keys create`. Put a TLS proxy before it where it listens on more than this machine.
    """
    if not has_gateway_parts():
        raise BadInput("the gateway's libraries are missing: pip install 'stoker[gateway]'")
    host, port = settings.gateway.host, settings.gateway.port
    if port and is_answering(host, port):
        raise BadInput(f"port {port} of {host} is taken: set STOKER_GATEWAY__PORT to another")
    environment = gateway_environment(connected(settings))
    os.execve(sys.executable, [sys.executable, "-m", "api.server"], environment)  # noqa: S606


@click.command()
@click.pass_obj
def migrate(settings: Settings) -> None:
    """Create or update the database's schema; safe to repeat."""
    prepare_schema(connected(settings))
    say("the schema is up to date")


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def doctor(settings: Settings, as_json: bool) -> int:
    """Check every service, queue, migration and engine; say what is wrong and the remedy."""
    findings = examine(connected(settings))
    if as_json:
        emit_json([asdict(finding) for finding in findings])
    else:
        emit_table(
            "doctor",
            ("", "what", "found", "remedy"),
            [("ok" if f.is_well else "!!", f.what, f.found, f.remedy) for f in findings],
        )
    if any(finding.unreachable for finding in findings):
        return EXIT_UNREACHABLE
    return 0 if all(finding.is_well for finding in findings) else 1


def _wait_for_signal(started: Sequence[LocalProcess]) -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        for one in started:
            one.expect_alive()
