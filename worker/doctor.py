"""What must be there for jobs to run, checked one by one: what was found, and the remedy where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from inference.engines import plan_engine
from models.states import RunState
from pipeline.due_times import due_times, zone_of
from pipeline.endpoints import known_endpoints
from pipeline.identity import identify_endpoint
from pipeline.probing import EndpointLook, reach
from runtime.clock import utc_now
from runtime.errors import BadInput, ServiceUnreachable, StokerError
from runtime.metrics import answers_metrics
from runtime.settings import METRICS_PARTS, Settings
from runtime.tracing import ask_receiver
from store.database import Database
from store.documents import tally_of
from store.health import has_dispatch_leader, postgres_version, probe_write
from store.looks import LookBoard
from store.presence import PresenceBoard, WorkerPresence
from store.revisions import Revisions, schema_revisions
from store.schedules import StoredSchedule, last_runs, schedules_of_all
from store.validating import waiting_s
from worker.celery_app import make_app
from worker.queues import HintPublisher
from worker.semantic import embedder_of, index_of

LONG_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing checked. An empty remedy means it is well; `unreachable` that a service does not answer."""

    what: str
    found: str
    remedy: str = ""
    unreachable: bool = False

    @property
    def is_well(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.remedy


def examine(settings: Settings) -> list[Finding]:
    """Check every part; one that fails never hides another."""
    checks: tuple[tuple[str, Callable[[Settings], list[Finding]]], ...] = (
        ("postgres", _postgres),
        ("postgres disk", _postgres_disk),
        ("broker", _broker),
        ("redis and workers", _workers),
        ("engine", _engine),
        ("endpoints", _endpoints),
        ("semantic cache", _semantic_cache),
        ("documents", _documents),
        ("gateway", _gateway),
        ("traces", _traces),
        ("schedules", _schedules),
        ("metrics", _metrics),
    )
    findings: list[Finding] = []
    for what, check in checks:
        try:
            findings += check(settings)
        except ServiceUnreachable as error:
            found, _, remedy = str(error).rpartition("; ")
            if found not in {finding.found for finding in findings}:
                findings.append(Finding(what, found, remedy, unreachable=True))
        except StokerError as error:
            findings.append(Finding(what, "not usable", str(error)))
    return findings


def _postgres(settings: Settings) -> list[Finding]:
    database = Database(settings.require_postgres(), pool_size=1)
    try:
        with database.transaction() as session:
            version = postgres_version(session)
            revisions = schema_revisions(session)
            leads = has_dispatch_leader(session)
    finally:
        database.close()
    return [
        Finding("postgres", f"version {version} at {database.address}"),
        Finding("schema", f"revision {revisions.current or 'none'}", _schema_remedy(revisions)),
        Finding(
            "dispatch leader",
            "leads" if leads else "none",
            "" if leads else "start a worker (`stoker worker`) or `stoker dispatch`; nothing is sent out without one",
        ),
    ]


def _schema_remedy(revisions: Revisions) -> str:
    if revisions.is_behind:
        return f"run `stoker migrate` (newest is {revisions.newest})"
    if revisions.is_ahead:
        return f"this version knows {revisions.newest}: update it soon, it may run beside newer ones meanwhile"
    return ""


def _postgres_disk(settings: Settings) -> list[Finding]:
    database = Database(settings.require_postgres(), pool_size=1)
    try:
        with database.transaction() as session:
            probe_write(session)
    finally:
        database.close()
    return [Finding("postgres disk", "can be written")]


def _broker(settings: Settings) -> list[Finding]:
    publisher = HintPublisher(make_app(settings), delivery_limit=settings.broker.delivery_limit)
    try:
        ready = publisher.ready_count()
        publisher.probe()
    finally:
        publisher.close()
    return [Finding("broker", f"queue generation, {ready} hints waiting")]


def _workers(settings: Settings) -> list[Finding]:
    board = PresenceBoard(settings.require_redis())
    try:
        workers = board.workers(node=None)
    finally:
        board.close()
    if not workers:
        return [Finding("redis", "answers"), Finding("workers", "none live", "start one: `stoker worker`")]
    return [
        Finding("redis", "answers"),
        *(
            Finding(
                f"worker {worker.name}",
                f"{worker.children} children, {worker.engine}{_serves(worker)}",
                "" if worker.healthy else "its engine does not answer: see the worker's log; it restarts by itself",
            )
            for worker in workers
        ),
    ]


def _serves(worker: WorkerPresence) -> str:
    own = f", serves {', '.join(worker.models)}" if worker.models else ""
    return own + (f", through external endpoints {', '.join(worker.external_models)}" if worker.external_models else "")


def _engine(settings: Settings) -> list[Finding]:
    """What a worker started on this machine would run."""
    if settings.engine.url is not None:
        identity = identify_endpoint(settings.engine.url, plan=None, settings=settings)
        return [Finding("engine", f"{identity.label} at {settings.engine.url}, serves {', '.join(identity.models)}")]
    try:
        plan = plan_engine(settings.engine, socket=Path(tempfile.gettempdir()) / "doctor.sock")
    except BadInput as error:
        return [Finding("engine on this machine", "cannot start here", str(error))]
    if plan is None:
        return [Finding("engine on this machine", "none is wanted")]
    checkpoint = f"{plan.kind} with {plan.description['checkpoint']} ({plan.description['quantization']})"
    return [Finding("engine on this machine", checkpoint, plan.warning or "")]


def _endpoints(settings: Settings) -> list[Finding]:
    """Whether each registered endpoint can be reached from here; none is asked to generate."""
    database = Database(settings.require_postgres(), pool_size=1)
    try:
        specs = known_endpoints(database, settings)
    finally:
        database.close()
    return [_endpoint(look) for look in reach(specs)] or [Finding("endpoints", "none beside the workers' engines")]


def _endpoint(look: EndpointLook) -> Finding:
    what, told = (
        f"endpoint {look.spec.name}",
        f"{look.spec.trust} at {look.spec.url}, for {', '.join(look.spec.models)}",
    )
    if look.is_well:
        return Finding(what, told if look.listed is not None else f"{told}; it lists no models to us")
    remedy = f"{look.fault}; `stoker endpoints check {look.spec.name}` asks it again"
    return Finding(what, told, remedy, unreachable=look.is_unreachable)


def _documents(settings: Settings) -> list[Finding]:
    """What waits to be read, what failed, and whether anybody reads."""
    database = Database(settings.require_postgres(), pool_size=1)
    board = PresenceBoard(settings.require_redis())
    try:
        with database.transaction() as session:
            tally = tally_of(session, None)
        readers = board.workers(node="documents")
    finally:
        board.close()
        database.close()
    open_count = tally.pending + tally.running
    remedy = "start a reader: `stoker worker --node documents`" if open_count and not readers else ""
    if tally.unindexed and settings.cache.chroma_url is None:
        remedy = (
            remedy or "set STOKER_CACHE__CHROMA_URL for the documents node; until then searches compare all vectors"
        )
    found = f"{tally.ready:,} ready, {tally.failed:,} failed, {open_count:,} waiting, {len(readers)} workers read"
    return [Finding("documents", found, remedy), Finding("documents' readers", _network_of_readers())]


def _network_of_readers() -> str:
    """What keeps a document's reader from the network on this machine; tried in a process that it may be taken from."""
    script = "import sys; from documents.confinement import leave_network; sys.exit(not leave_network())"
    if subprocess.run([sys.executable, "-c", script], check=False).returncode == 0:
        return "have no network"
    return "no namespace is allowed here: Python's calls to the network are refused, native code's are not"


def _gateway(settings: Settings) -> list[Finding]:
    """Whether batches wait for a validator."""
    database = Database(settings.require_postgres(), pool_size=1)
    try:
        with database.transaction() as session:
            waited_s = waiting_s(session)
    finally:
        database.close()
    if waited_s is None:
        return [Finding("gateway", "no batch waits to be validated")]
    remedy = "" if waited_s < LONG_WAIT_S else "start a gateway (`stoker gateway`), or give it more validators"
    return [Finding("gateway", f"the oldest batch waits for {waited_s:.0f} s to be validated", remedy)]


def _schedules(settings: Settings) -> list[Finding]:
    """How many there are, which are overdue, and whether anybody runs them."""
    database = Database(settings.require_postgres(), pool_size=1)
    board, looks = PresenceBoard(settings.require_redis()), LookBoard(settings.require_redis())
    try:
        with database.transaction() as session:
            schedules = schedules_of_all(session)
            last = last_runs(session, [schedule.id for schedule in schedules])
        runners, looked = board.workers(node="control"), looks.last()
    finally:
        looks.close()
        board.close()
        database.close()
    if not schedules:
        return [Finding("schedules", "none")]
    now = utc_now()
    overdue = [schedule.name for schedule in schedules if _is_overdue(schedule, now)]
    failed = [one.name for one in schedules if one.id in last and last[one.id].state is RunState.FAILED]
    found = (
        f"{len(schedules)}, {len(overdue)} overdue{_some(overdue)}, {len(failed)} failed last{_some(failed)}; "
        f"run by {len(runners)} control workers; last looked for "
    )
    found += "at no known time" if looked is None else f"{(now - looked).total_seconds():.0f} s ago"
    is_late = looked is None or (now - looked).total_seconds() > LONG_WAIT_S
    remedy = ""
    if not runners:
        remedy = "start a control worker: `stoker worker --node control`"
    elif overdue or is_late:
        remedy = (
            "see the control workers' logs; if all their children are busy, give them more: STOKER_WORKER__CHILDREN"
        )
    elif failed:
        remedy = f"`stoker schedule show {failed[0]}` says why"
    return [Finding("schedules", found, remedy)]


def _is_overdue(schedule: StoredSchedule, now: datetime) -> bool:
    """Whether a time that is due has not been seen to for a while."""
    due = next(due_times(schedule.cron, zone_of(schedule.timezone), after=schedule.due_until), now)
    return (now - due).total_seconds() > LONG_WAIT_S


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def _metrics(settings: Settings) -> list[Finding]:
    """Whether the processes of this machine answer; whether others do is Prometheus's to say."""
    first, host = settings.metrics.port, settings.metrics.host
    if first is None:
        return [Finding("metrics", "off: STOKER_METRICS__PORT is not set")]
    found = [port for port in range(first, first + len(METRICS_PARTS)) if answers_metrics(host, port)]
    if found:
        return [Finding("metrics", ", ".join(f"http://{host}:{port}/metrics" for port in found) + " answers")]
    board = PresenceBoard(settings.require_redis())
    try:
        is_here = any(worker.name.endswith(f"@{os.uname().nodename}") for worker in board.workers(node=None))
    finally:
        board.close()
    remedy = "start the workers of this machine with STOKER_METRICS__PORT; their logs say why if they cannot answer"
    return [Finding("metrics", f"nothing answers at {host}:{first} on this machine", remedy if is_here else "")]


def _semantic_cache(settings: Settings) -> list[Finding]:
    """Off is a fault only where it is the default mode."""
    cache = settings.cache
    if cache.chroma_url is None:
        remedy = "" if cache.mode != "semantic" else "set STOKER_CACHE__CHROMA_URL, or run `make cache` and `stoker up`"
        return [Finding("semantic cache", "off: no Chroma is set; semantic lookups are misses", remedy)]
    embed, endpoints = embedder_of(cache)
    index_of(cache).probe()
    found = "an endpoint" if endpoints else str(cache.embedder)
    return [Finding("semantic cache", f"Chroma answers at {cache.chroma_url}; embedder {embed.id} ({found})")]


def _traces(settings: Settings) -> list[Finding]:
    """Where spans go, and whether they would be taken there now."""
    if settings.trace.to == "off":
        return [Finding("traces", "off")]
    receiver, fault = ask_receiver(settings)
    if fault is not None:
        remedy = "work goes on without: look at the receiver, at STOKER_TRACE__URL and STOKER_TRACE__API_KEY"
        return [Finding("traces", f"{receiver}: {fault}", remedy, unreachable=True)]
    share = "" if settings.trace.sample == 1 else f", {settings.trace.sample:.3g} of all batches"
    said = "; prompts and answers go with them" if settings.trace.prompts else ""
    return [Finding("traces", f"to {receiver}{share}{said}")]
