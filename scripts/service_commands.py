"""Commands about processes and services: worker, dispatch, up, migrate, doctor."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import click

from pipeline.keys import ensure_first_key
from runtime.errors import EXIT_UNREACHABLE, BadInput, extra_remedy
from runtime.logs import configure_logs
from runtime.redaction import secrets_of
from runtime.settings import METRICS_PARTS, MetricsPart, Settings, environment_of
from runtime.tracing import check_tracing
from scripts.embedded import HomeInUse, free_port, home_owner, is_answering
from scripts.flower_command import has_flower, local_flower
from scripts.local import (
    GatewayPlace,
    LocalProcess,
    announce_gateway,
    connected,
    gateway_environment,
    gateway_is_coming,
    has_gateway_parts,
    has_reading_parts,
    has_semantic_parts,
    home_of,
    kept_worker,
    local_gateway,
    local_services,
    local_worker,
    prepare_schema,
    running_gateway,
)
from scripts.lookup import opened_database
from scripts.metrics_places import metrics_told, require_metrics_ports
from scripts.terminal import bar, emit, emit_json, emit_table, say
from worker.dispatcher import run_dispatcher
from worker.doctor import examine

LOOK_S = 0.2
EXPRESS_SLOTS = 1  # of an `up` whose settings name none: who tries something on a machine does one thing at a time
WITHOUT_GATEWAY_S = 30.0  # an `up` says that its gateway is coming once its services run, within some seconds


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--node",
    type=click.Choice(["generation", "documents", "control"]),
    help="generation: an engine and its batches; documents: reading documents; control: running schedules. Default: "
    "STOKER_WORKER__NODE.",
)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def worker(settings: Settings, node: str | None, celery_options: tuple[str, ...]) -> None:
    """Run a worker with its engine: short for `celery -A worker.main worker`; options go to Celery."""
    served = connected(settings)
    if (node or served.worker.node) == "generation":
        check_tracing(served)
    environment = {**os.environ, **environment_of(served)} | ({"STOKER_WORKER__NODE": node} if node else {})
    command = [sys.executable, "-m", "celery", "-A", "worker.main", "worker", *celery_options]
    os.execve(sys.executable, command, environment)  # noqa: S606  # the worker takes this process's place


@click.command()
@click.pass_obj
def dispatch(settings: Settings) -> None:
    """Run a dispatch loop: leads, or stands by while another one leads. Every worker has one too."""
    served = connected(settings)
    configure_logs(served.log, secrets=secrets_of(served))
    run_dispatcher(served)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print where the gateway and its key are, once all is up.")
@click.option("--until-eof", is_flag=True, help="End when standard input does: for programs that start it.")
@click.pass_obj
def up(settings: Settings, as_json: bool, until_eof: bool) -> None:
    """Run everything on this machine until Ctrl-C: Postgres, Valkey, a worker with its engine, dispatch, the gateway.

    Chroma too, if the semantic cache can work here. Other commands in other terminals find them by themselves. With
    --json, one that runs already is told of, and no other is started: this command then ends with that one.
    """
    if as_json and not has_gateway_parts():
        raise BadInput(f"the gateway's libraries are missing: {extra_remedy('gateway')}")
    check_tracing(settings)
    stop = threading.Event()
    if until_eof:
        threading.Thread(target=_set_at_eof, args=[stop], daemon=True).start()
    while not stop.is_set():
        if as_json and (running := _running_elsewhere(settings, stop)) is not None:
            _emit_place(running)
            while until_eof and running_gateway(settings) == running and not stop.wait(1.0):
                pass
            return
        try:
            _run_everything(settings, stop, as_json=as_json)
        except HomeInUse:  # somebody was quicker
            if not as_json:
                raise
        else:
            return


def _run_everything(settings: Settings, stop: threading.Event, *, as_json: bool) -> None:
    with_chroma = settings.is_embedded and has_semantic_parts(settings)
    if settings.is_embedded and not with_chroma:
        say(f"without Chroma: the semantic cache needs its libraries and an embedder in {settings.cache.embedder}")
    with local_services(settings, with_chroma=with_chroma) as served:
        require_metrics_ports(served)
        if has_gateway_parts():
            announce_gateway(served, None)
        prepare_schema(served)
        with ExitStack() as stack:
            with bar("starting the engine", total=None) as show:
                started = [stack.enter_context(local_worker(_with_express(served), on_wait=show))]
            if has_reading_parts(served):
                started.append(stack.enter_context(local_worker(served, name="documents", node="documents")))
            stack.enter_context(kept_worker(served, name="control", node="control"))
            page = _start_gateway(served, stack, started, as_json=as_json)
            page += metrics_told(served, [part for part in METRICS_PARTS if _runs(part, served)])
            if has_flower():
                page += stack.enter_context(local_flower(served))
            stack.callback(say, "stopping")
            say(
                f"up; logs in {home_of(settings) / 'logs'}\n{page}"
                "submit from another terminal: stoker submit FILE.jsonl; stop with Ctrl-C"
            )
            _wait_while_alive(started, stop)


def _runs(part: MetricsPart, settings: Settings) -> bool:
    return {"documents": has_reading_parts(settings), "gateway": has_gateway_parts()}.get(part, True)


def _with_express(settings: Settings) -> Settings:
    """Settings of a worker that answers single requests too: its gateway takes them."""
    if settings.worker.express_slots or not has_gateway_parts():
        return settings
    worker = settings.worker.model_copy(update={"express_slots": EXPRESS_SLOTS})
    return settings.model_copy(update={"worker": worker})


def _running_elsewhere(settings: Settings, stop: threading.Event) -> GatewayPlace | None:
    """The gateway of another `stoker up` that has this home, also of one that is just starting; None if none is.

    Raises BadInput if somebody has it for long who starts no gateway, such as a `stoker run`.
    """
    looks = 0
    while settings.is_embedded and (owner := home_owner(home_of(settings))) is not None and not stop.is_set():
        if (running := running_gateway(settings)) is not None:
            return running
        looks = 0 if gateway_is_coming(settings) else looks + 1
        if looks * LOOK_S > WITHOUT_GATEWAY_S:
            raise BadInput(
                f"{home_of(settings)} is in use by process {owner}, which has no gateway: wait for its end, or choose "
                "another folder with STOKER_HOME"
            )
        stop.wait(LOOK_S)
    return None


def _start_gateway(settings: Settings, stack: ExitStack, started: list[LocalProcess], *, as_json: bool) -> str:
    """Start the gateway if it can run here; what is to be said of it."""
    if not has_gateway_parts():
        return f"no gateway and no page: their libraries are missing ({extra_remedy('gateway')})\n"
    wished = (settings.gateway.host, settings.gateway.port)
    host, port = wished if not is_answering(*wished) else (wished[0], free_port(wished[0]))
    taken = "" if port == wished[1] else f"port {wished[1]} is taken, so another one is used\n"
    settings = settings.model_copy(update={"gateway": settings.gateway.model_copy(update={"port": port})})
    file = home_of(settings) / "key"
    with opened_database(settings) as database:
        key = ensure_first_key(database, file)
    started.append(stack.enter_context(local_gateway(settings)))
    place = GatewayPlace(url=f"http://{host}:{port}/v1", key_file=str(file))
    announce_gateway(settings, place)
    if as_json:
        _emit_place(place)
    known = f"its key is in {file}" if key else "make a key for it with `stoker keys create`"
    return f"{taken}page: http://{host}:{port}/ and API: {place.url}; {known}\n"


@click.command()
@click.pass_obj
def gateway(settings: Settings) -> None:
    """Run the HTTP door: the OpenAI-compatible API and the page, with the validators behind it.

    Keys are made with `stoker keys create`. Put a TLS proxy before it where it listens on more than this machine.
    """
    if not has_gateway_parts():
        raise BadInput(f"the gateway's libraries are missing: {extra_remedy('gateway')}")
    host, port = settings.gateway.host, settings.gateway.port
    if port and is_answering(host, port):
        raise BadInput(f"port {port} of {host} is taken: set STOKER_GATEWAY__PORT to another")
    environment = gateway_environment(connected(settings))
    os.execve(sys.executable, [sys.executable, "-m", "api.server"], environment)  # noqa: S606


@click.command()
@click.pass_obj
def migrate(settings: Settings) -> None:
    """Create or update the database's schema; safe to repeat."""
    before, after = prepare_schema(connected(settings))
    if before == after:
        say(f"the schema is up to date: revision {after}")
    else:
        say(f"the schema is up to date: revision {after}, before {before or 'none'}")


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


def _emit_place(place: GatewayPlace) -> None:
    emit(json.dumps(asdict(place)))


def _set_at_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


def _wait_while_alive(started: Sequence[LocalProcess], stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        for one in started:
            one.expect_alive()
