"""What being seen costs: a worker with traces, metrics and Flower, beside one without, by turns in one run.

    python -m benchmarks.observability [--pairs 6] [--leg-s 15]

Services of its own. Each leg starts a worker, warms it up and gives it one batch. `seen` sends every span of every
batch to an OpenTelemetry receiver (nginx, which says 200 and keeps nothing), counts for Prometheus and is scraped every
5 s with its engine's metrics, sends its events to a Flower that runs, and has a control node with its beat beside it.
First on vLLM with answers of 64 tokens, which is what the system is for; then on an endpoint that costs nothing, which
shows what a job costs in CPU. There a row more samples one batch in a hundred. The engine, and that endpoint, have the
first core, everything else the second, as end to end. About 20 minutes. Writes benchmarks/results/observability.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.batch_lines import write_batch
from benchmarks.cores import kept_on, two_cores
from benchmarks.end_to_end import planned_on
from benchmarks.legs import Leg, run_ours
from benchmarks.paired import Ratio, by_turns, keep_run, made_with
from benchmarks.place import Place, own_place
from benchmarks.rows import Row, at_least, bold
from benchmarks.static_endpoint import MODEL, StaticEndpoint
from benchmarks.workloads import WORKLOADS, Workload, write_workload
from inference.supervisor import EngineSupervisor
from runtime.settings import Settings, load_settings
from scripts.flower_command import local_flower
from scripts.local import local_worker
from tests.support.own_services import free_port

PLAIN: Final = "plain"
SEEN: Final = "seen"
SAMPLED: Final = "seen, 1 batch in 100"
COMMAND: Final = "`make bench-observability`"
LEAST: Final = 0.98  # target: at most 2% of the throughput
PAIRS: Final = 6  # even: each side is as often the first, and the difference that is looked for is small
SCRAPE_EVERY_S: Final = 5.0
PROBE_JOBS: Final = 4_000
SLOTS: Final = 64


@dataclass(slots=True)
class Room:
    """Where legs run: on one endpoint, for every side."""

    place: Place
    folder: Path
    url: str
    endpoint_pid: int
    receiver: StaticEndpoint
    write: Callable[[Path, int, int], Path]  # (path, jobs, leg)
    warm_up_jobs: int
    probe_jobs: int
    legs: dict[str, list[Leg]] = field(default_factory=dict)
    leg: int = 0

    def run(self, side: str, jobs: int) -> Leg:
        """One leg of a side, with a worker of its own."""
        self.leg += 1
        file = self.write(self.folder / f"{self.leg}.jsonl", jobs, self.leg)
        warm_up = self.write(self.folder / f"{self.leg}-warm.jsonl", self.warm_up_jobs, 10_000 + self.leg)
        settings = self._settings(side)
        with _observers(settings) if side != PLAIN else nullcontext():
            leg = run_ours(settings, file, self.place.servers, warm_up=warm_up, endpoint_pid=self.endpoint_pid)
        for written in (file, warm_up):
            written.unlink()
        self.legs.setdefault(side, []).append(leg)
        print(f"  {side}: {leg.jobs_per_s:,.1f} jobs/s, {leg.outside_us:,.0f} µs a job outside the engine", flush=True)
        return leg

    def _settings(self, side: str) -> Settings:
        base = self.place.settings
        engine = base.engine.model_copy(update={"url": self.url, "max_num_seqs": SLOTS})
        settings = base.model_copy(update={"engine": engine})
        if side == PLAIN:
            return settings
        url = self.receiver.url.removesuffix("/v1") + "/v1/traces"
        sample = 0.01 if side == SAMPLED else 1.0
        return settings.model_copy(
            update={
                "trace": settings.trace.model_copy(update={"to": "otlp", "url": url, "sample": sample}),
                "metrics": settings.metrics.model_copy(update={"port": free_port()}),
                "flower": settings.flower.model_copy(update={"port": free_port(), "password": "of-a-benchmark"}),
            }
        )


@contextmanager
def _observers(settings: Settings) -> Iterator[None]:
    """Flower, a control node with its beat, and a scraper of the worker's metrics."""
    stop = threading.Event()
    scraper = threading.Thread(target=_scrape, args=[settings.metrics.port, stop], daemon=True)
    apart = settings.model_copy(update={"metrics": settings.metrics.model_copy(update={"port": free_port()})})
    with local_flower(settings), local_worker(apart, name="control", node="control"):
        scraper.start()
        try:
            yield
        finally:
            stop.set()
            scraper.join()


def _scrape(port: int | None, stop: threading.Event) -> None:
    while not stop.wait(SCRAPE_EVERY_S):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_EVERY_S) as answer:
                answer.read()
        except OSError:  # before the worker is up, and after its end
            continue


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--leg-s", type=float, default=15, help="how long a leg is to take")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    cores = two_cores()
    with (
        own_place() as place,
        tempfile.TemporaryDirectory() as folder,
        kept_on({cores[1]}, place.servers) as pinned,
        StaticEndpoint(core=cores[0]) as static,
    ):
        found |= {"servers": place.versions(), "pinned": {"engine": cores[0], "all else": cores[1], "what": pinned}}
        print("on vLLM, answers of 64 tokens")
        with _vllm_room(place, Path(folder), static, core=cores[0]) as room:
            found["vllm"] = _measured(room, (PLAIN, SEEN), options)
        print("on an endpoint that costs nothing")
        room = Room(place, Path(folder), static.url, static.pid, static, _static_batch, 256, PROBE_JOBS)
        found["static"] = _measured(room, (PLAIN, SEEN, SAMPLED), options)
    report = {"made_with": made_with("celery", "opentelemetry-sdk", "prometheus-client", "flower"), **found}
    report |= {"options": vars(options), "table": [row.as_json() for row in rows(found)]}
    keep_run("observability", report, parser, options)


@contextmanager
def _vllm_room(place: Place, folder: Path, receiver: StaticEndpoint, *, core: int) -> Iterator[Room]:
    asked = load_settings().engine.model_copy(update={"max_num_seqs": SLOTS, "url": None})
    plan = planned_on(asked, folder / "engine.sock", [core])
    workload = next(one for one in WORKLOADS if one.name == "64 tokens")
    log, model = folder / "engine.log", plan.alias
    with EngineSupervisor(plan, log_file=log, start_timeout_s=asked.start_timeout_s, stall_s=asked.stall_s) as engine:
        assert engine.pid is not None
        yield Room(place, folder, plan.url, engine.pid, receiver, partial(_vllm_batch, workload, model), SLOTS, SLOTS)


def _vllm_batch(workload: Workload, model: str, path: Path, jobs: int, leg: int) -> Path:
    return write_workload(path, replace(workload, jobs=jobs), model=model, leg=leg)


def _static_batch(path: Path, jobs: int, leg: int) -> Path:
    del leg  # nothing is cached there
    return write_batch(path, jobs, model=MODEL)


def _measured(room: Room, sides: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Every side's legs by turns; all have as many jobs as a probe of the plain one says."""
    probe = room.run(PLAIN, room.probe_jobs)
    jobs = max(2 * SLOTS, round(probe.jobs_per_s * options.leg_s))
    room.legs.clear()
    turns = {side: partial(_rate, room, side, jobs) for side in sides}
    rates = by_turns(turns, pairs=options.pairs)
    return {
        "jobs": jobs,
        "jobs_per_s": rates,
        "legs": {side: [leg.as_json() for leg in legs] for side, legs in room.legs.items()},
    }


def _rate(room: Room, side: str, jobs: int) -> float:
    leg = room.run(side, jobs)
    return leg.jobs_per_s


def rows(found: Mapping[str, Any]) -> list[Row]:
    """The ratios, and what a job costs more."""
    vllm, static = found["vllm"], found["static"]
    ratio = Ratio.of(vllm["jobs_per_s"][SEEN], vllm["jobs_per_s"][PLAIN])
    shown = [
        Row(
            f"traces of every job, metrics, Flower, a beat ÷ none of them: {vllm['jobs']:,} chats of 64 tokens on vLLM",
            bold(ratio),
            COMMAND,
            headline=True,
            **at_least(ratio, LEAST),
        )
    ]
    for side in (SEEN, SAMPLED):
        ratio = Ratio.of(static["jobs_per_s"][side], static["jobs_per_s"][PLAIN])
        more = _outside_us(static, side) - _outside_us(static, PLAIN)
        figure = f"{side} ÷ plain on an endpoint that costs nothing, {static['jobs']:,} jobs; CPU a job more"
        shown.append(Row(figure, f"{bold(ratio)}; {more:,.0f} µs", COMMAND))
    return shown


def _outside_us(found: Mapping[str, Any], side: str) -> float:
    return float(statistics.median(leg["cpu_us_outside"] for leg in found["legs"][side]))


if __name__ == "__main__":
    main()
