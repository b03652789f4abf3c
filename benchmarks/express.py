"""Single requests beside a batch, on a real engine: `python -m benchmarks.express [--requests 60] [--clients 2]`.

Through the whole system: gateway, RabbitMQ, the express node, an engine that is a worker's own. By turns of the sides:

  alone        single requests, and no batch
  unprotected  beside a batch that keeps twice the engine's sequences in flight
  low cap      beside a batch that keeps half of them in flight, whether there are single requests or not
  ours         beside a batch whose worker keeps a quarter of them free while single requests come (and vLLM computes
               these first: --scheduling-policy priority)

Each client asks for 32 tokens, and asks again as soon as it has them. Before, the batch runs for a while by itself. On
a scripted engine of 16 slots, whose answers take 1 s (lognormal) whatever else the machine does; on llama.cpp; and on
vLLM. Postgres, RabbitMQ, Redis, engine and clients share the cores. About 20 minutes.
Writes benchmarks/results/express.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import text

from benchmarks.batch_lines import write_batch
from benchmarks.own_batch import TENANT, stored
from benchmarks.paired import keep_run, made_with
from benchmarks.place import own_place
from benchmarks.rows import Row
from inference.engines import plan_engine
from models.states import Scope
from pipeline.keys import issue_key
from runtime.children import spawn, stop
from runtime.settings import Settings, environment_of, made
from scripts.local import local_worker
from store.batches import batch_progress, request_cancel
from store.database import Database
from store.presence import PresenceBoard
from tests.support.gateway_process import GatewayProcess
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until
from worker.shared import SharedState

COMMAND: Final = "`make bench-express`"
LINES: Final = 20_000  # more than any leg gets done
SLOTS: Final = {"llamacpp": 4, "scripted": 16, "vllm": 16}
SCRIPTED_S, SCRIPTED_SIGMA = 1.0, 0.2
ALONE, UNPROTECTED, LOW_CAP, OURS = "alone", "unprotected", "low cap", "ours"
SIDES: Final = (ALONE, UNPROTECTED, LOW_CAP, OURS)
BY_ITSELF_S: Final = 10.0
FLOWS: Final = 30  # results after which a batch is in its flow
TOKENS: Final = 32
Kind = Literal["scripted", "llamacpp", "vllm"]


@dataclass(frozen=True, slots=True)
class Leg:
    """What one side gave: seconds of each request, the first of each client apart, and the batch's output tokens/s."""

    side: str
    seconds: list[float]
    first_seconds: list[float]
    batch_tokens_s: float
    batch_tokens_s_by_itself: float

    @property
    def p50_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99_s(self) -> float:
        return sorted(self.seconds)[min(len(self.seconds) - 1, round(0.99 * len(self.seconds)))]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "p50_s": round(self.p50_s, 3), "p99_s": round(self.p99_s, 3)}


@dataclass(frozen=True, slots=True)
class Door:
    """A gateway and a key for it."""

    gateway: GatewayProcess
    key: str
    database: Database
    batch: Path


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="of each leg")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="of all sides; their requests count together")
    parser.add_argument("--engines", default="scripted,llamacpp,vllm", help="which of these")
    options = parser.parse_args()
    report: dict[str, Any] = {"made_with": made_with("celery"), "options": vars(options), "engines": {}}
    kinds: list[Kind] = [kind for kind in SLOTS if kind in options.engines.split(",")]  # type: ignore[misc]
    with own_place() as place, tempfile.TemporaryDirectory() as folder:
        report["servers"] = place.versions()
        for kind in kinds:
            settings = served(place.settings, kind)
            if kind == "vllm" and not made(settings.engine.vllm_python).exists():
                print("without vLLM: its environment is not there")
                continue
            with scripted_engine() if kind == "scripted" else nullcontext(settings.engine.url) as url:
                report["engines"][kind] = measured(
                    settings.model_copy(update={"engine": settings.engine.model_copy(update={"url": url})}),
                    kind,
                    Path(folder),
                    options,
                )
    report["table"] = [row.as_json() for row in rows_of(report)]
    keep_run("express", report, parser, options, is_whole=len(report["engines"]) == len(SLOTS))


def served(settings: Settings, kind: Kind) -> Settings:
    """A worker with this engine."""
    changed = {"url": None, "kind": "none" if kind == "scripted" else kind, "max_num_seqs": SLOTS[kind]}
    return settings.model_copy(update={"engine": settings.engine.model_copy(update=changed)})


@contextmanager
def scripted_engine() -> Iterator[str]:
    """Where a scripted engine answers that takes first what came first."""
    with ScriptedEndpoint(latency_s=SCRIPTED_S, latency_sigma=SCRIPTED_SIGMA, slots=SLOTS["scripted"]) as endpoint:
        yield endpoint.url


def measured(settings: Settings, kind: Kind, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every side's legs by turns on one kind of engine."""
    plan = plan_engine(settings.engine, socket=Path("engine.sock"))
    slots, model = SLOTS[kind] if plan is None else plan.slots, "scripted" if plan is None else plan.alias
    database = Database(settings.require_postgres())
    with database.transaction() as session:
        key = issue_key(session, tenant=TENANT, name=kind, scopes=(Scope.SUBMIT,), requests_per_minute=1_000_000).key
    env = {**environment_of(settings), "STOKER_GATEWAY__VALIDATORS": "1"}
    legs: dict[str, list[Leg]] = {side: [] for side in SIDES}
    with GatewayProcess(env=env, folder=folder) as gateway:
        batch = write_batch(folder / f"{kind}.jsonl", LINES, model=model)
        door = Door(gateway, key.text, database, batch)
        for round_ in range(options.rounds):
            for side in SIDES if round_ % 2 == 0 else reversed(SIDES):
                leg = run_leg(settings, side, door, slots, model, options)
                legs[side].append(leg)
                print(
                    f"  {kind}, {side}: p50 {leg.p50_s:.2f} s, p99 {leg.p99_s:.2f} s of {len(leg.seconds)}; "
                    f"batch {leg.batch_tokens_s:.0f} tokens/s, by itself {leg.batch_tokens_s_by_itself:.0f}",
                    flush=True,
                )
    database.close()
    sides = {side: merged(side, found).as_json() for side, found in legs.items()}
    engine = {"kind": kind} if plan is None else dict(plan.description)
    return {"engine": engine, "slots": slots, "express_slots": slots // 4, "sides": sides}


def merged(side: str, legs: list[Leg]) -> Leg:
    """All requests of a side's legs together."""
    return Leg(
        side,
        [second for leg in legs for second in leg.seconds],
        [second for leg in legs for second in leg.first_seconds],
        round(statistics.mean(leg.batch_tokens_s for leg in legs), 1),
        round(statistics.mean(leg.batch_tokens_s_by_itself for leg in legs), 1),
    )


def run_leg(settings: Settings, side: str, door: Door, slots: int, model: str, options: argparse.Namespace) -> Leg:
    """One side with a worker, an engine and a batch of its own."""
    worker = settings.worker.model_copy(
        update={
            "express_slots": slots // 4 if side == OURS else 0,
            "in_flight": slots // 2 if side == LOW_CAP else None,
            "children": 1 if side == LOW_CAP else None,
        }
    )
    settings = settings.model_copy(update={"worker": worker})
    with ExitStack() as stack:
        engines = stack.enter_context(engine_folder())
        stack.enter_context(local_worker(settings, name="bench"))
        stack.enter_context(nullcontext() if side == OURS else unprotected_node(settings, engines, slots))
        board = PresenceBoard(settings.require_redis())
        wait_until(lambda: bool(board.workers(node="express")), 60, "the express node is up")
        board.close()
        time.sleep(1.5)  # the gateway knows for a second who serves
        by_itself = 0.0
        if side != ALONE:
            stack.enter_context(running_batch(settings, door))
            by_itself = tokens_s(door.database, lambda: time.sleep(BY_ITSELF_S))
        firsts = asked(door, model, options.clients, requests=options.clients)
        found: list[float] = []
        rate = tokens_s(
            door.database, lambda: found.extend(asked(door, model, options.clients, requests=options.requests))
        )
        return Leg(side, [round(one, 4) for one in found], [round(one, 4) for one in firsts], rate, by_itself)


@contextmanager
def engine_folder() -> Iterator[Path]:
    """Where a worker that is started in this block puts its engine's socket."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="e-", dir="/tmp") as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


@contextmanager
def unprotected_node(settings: Settings, engines: Path, slots: int) -> Iterator[None]:
    """An express node beside a worker that does not know of it."""
    url = settings.engine.url
    if url is None:
        [socket] = engines.glob("stoker-worker-*/engine.sock")
        url = f"unix://{socket}"
    env = {
        **os.environ,
        **environment_of(settings),
        "STOKER_WORKER__NODE": "express",
        "STOKER_ENGINE__URL": url,
        "STOKER_ENGINE__MAX_NUM_SEQS": str(slots),
    }
    page = SharedState()
    with tempfile.NamedTemporaryFile(dir="/tmp") as log:
        command = [sys.executable, "-m", "worker.express", "express-bench@bench", page.path]
        child = spawn(command, env=env, log=Path(log.name), session=True)
        try:
            yield
        finally:
            stop(child, grace_s=20.0)


@contextmanager
def running_batch(settings: Settings, door: Door) -> Iterator[None]:
    """A batch in its flow, cancelled at the end."""
    before, _ = results_of(door.database)
    batch_id = stored(door.database, door.batch, settings)
    wait_until(lambda: results_of(door.database)[0] - before >= FLOWS, 300, "the batch is in its flow")
    try:
        yield
    finally:
        with door.database.transaction() as session:
            request_cancel(session, batch_id)
        wait_until(lambda: has_ended(door.database, batch_id), 120, "the batch is cancelled")


def has_ended(database: Database, batch_id: UUID) -> bool:
    """Whether nothing of a batch is to come any more."""
    with database.transaction() as session:
        return batch_progress(session, batch_id, tenant=TENANT).ended_at is not None


def tokens_s(database: Database, meanwhile: Any) -> float:
    """Output tokens of results a second, while something is done."""
    began, (_, before) = time.monotonic(), results_of(database)
    meanwhile()
    _, after = results_of(database)
    return round((after - before) / (time.monotonic() - began), 1)


def results_of(database: Database) -> tuple[int, int]:
    """(how many, their output tokens)"""
    with database.transaction() as session:
        row = session.execute(text("SELECT count(*), coalesce(sum(completion_tokens), 0) FROM results")).one()
    return int(row[0]), int(row[1])


_NUMBERS: Final = count()


def asked(door: Door, model: str, clients: int, *, requests: int) -> list[float]:
    """Seconds of so many requests, by clients that ask one after another."""

    def client(own: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", door.gateway.port, timeout=300)
        headers = {"Authorization": f"Bearer {door.key}", "Content-Type": "application/json"}
        taken = []
        for _ in range(own):
            question = f"Question {next(_NUMBERS)}: what should I take along on a hike in the rain?"
            body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS}
            began = time.monotonic()
            connection.request("POST", "/v1/chat/completions", json.dumps(body | {"ignore_eos": True}), headers)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                raise SystemExit(f"a single request ended {answer.status}: {said.decode()}")
            taken.append(time.monotonic() - began)
        connection.close()
        return taken

    with ThreadPoolExecutor(clients) as pool:
        return [one for taken in pool.map(client, [requests // clients] * clients) for one in taken]


def rows_of(report: dict[str, Any]) -> list[Row]:
    """What the table shows of it."""
    rows = []
    for kind, found in report["engines"].items():
        sides = found["sides"]
        said = "; ".join(
            f"{side}: p50 {one['p50_s']:.2f} s, p99 {one['p99_s']:.2f} s"
            + ("" if side == ALONE else f", batch {one['batch_tokens_s']:.0f} tokens/s")
            for side, one in sides.items()
        )
        rows.append(Row(f"single requests beside a batch, {kind}", said, COMMAND, headline=kind == "vllm"))
    return rows


if __name__ == "__main__":
    main()
