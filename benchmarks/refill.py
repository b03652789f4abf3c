"""How full engines are kept: the share of their slots that stand empty while the batch still has jobs to send.

    python -m benchmarks.refill [--slots 2048] [--children 4] [--jobs 30000]

Scripted engines whose service times are lognormal, a real worker for each, the services that the settings name or
embedded ones. An engine itself adds up how long its slots are taken, from its first request to its last one's
arrival, the ramp at the start included. The tail is the share of the time, from the first result to the last, in which
the last 5% of the jobs end. Two small engines at the end: their workers' shards must not keep one of them busy alone.
Writes benchmarks/results/refill.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.own_batch import ended, result_times, stored
from benchmarks.paired import keep, made_with
from benchmarks.place import as_submitted
from models.states import CacheMode
from runtime.settings import Settings, load_settings
from scripts.local import local_services, local_worker, prepare_schema
from store.database import Database
from tests.support.scripted_endpoint import ScriptedEndpoint

POLL_S = 0.25


def main() -> None:
    """Measure each ratio of jobs in flight to slots, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--children", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=30_000)
    parser.add_argument("--median-s", type=float, default=4.0)
    parser.add_argument("--sigma", type=float, default=0.6)
    options = parser.parse_args()
    cases = [
        Case(engines=1, slots=options.slots, children=options.children, jobs=options.jobs, median_s=options.median_s),
        Case(
            engines=1,
            slots=options.slots,
            children=options.children,
            jobs=options.jobs,
            median_s=options.median_s,
            places_a_slot=2,
        ),
        Case(engines=2, slots=64, children=2, jobs=8_000, median_s=1.0, places_a_slot=2),
    ]
    rows = []
    with local_services(load_settings()) as settings:
        prepare_schema(settings)
        for case in cases:
            rows.append(measured(settings, case, sigma=options.sigma))
            print(json.dumps(rows[-1]), flush=True)
    keep("refill", {"made_with": made_with(), "rows": rows})


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: so many engines with so many slots each, and a worker for each."""

    engines: int
    slots: int
    children: int
    jobs: int
    median_s: float
    places_a_slot: int = 1

    @property
    def in_flight(self) -> int:
        """Jobs that one worker keeps in flight."""
        return self.slots * self.places_a_slot


def measured(settings: Settings, case: Case, *, sigma: float) -> dict[str, Any]:
    """One batch through the case's workers."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        engines = [
            running.enter_context(ScriptedEndpoint(latency_s=case.median_s, latency_sigma=sigma, slots=case.slots))
            for _ in range(case.engines)
        ]
        file = write_file(Path(folder) / "lines.jsonl", count=case.jobs)
        for number, engine in enumerate(engines):
            running.enter_context(local_worker(served_by(settings, case, engine.url), name=f"refill-{number}"))
        seconds, tail = run(settings, file)
        calls = [engine.calls() for engine in engines]
    capacity = sum(case.slots * call.arrival_s for call in calls)
    return {
        **asdict(case),
        "in_flight": case.in_flight,
        "service_sigma": sigma,
        "most_running": max(call.most_running for call in calls),
        "seconds_until_the_last_arrival": round(max(call.arrival_s for call in calls), 1),
        "seconds_until_the_last_result": round(seconds, 1),
        "starvation": round(1 - sum(call.slot_seconds for call in calls) / capacity, 4),
        "last_5_percent_of_the_time": round(tail, 4),
    }


def served_by(settings: Settings, case: Case, url: str) -> Settings:
    """Settings of the worker of one engine."""
    worker = settings.worker.model_copy(
        update={"children": case.children, "in_flight": case.in_flight // case.children}
    )
    engine = settings.engine.model_copy(update={"url": url, "max_num_seqs": case.slots})
    return settings.model_copy(update={"worker": worker, "engine": engine})


def write_file(path: Path, *, count: int) -> Path:
    """As many chats, all different."""
    with path.open("w") as opened:
        for number in range(count):
            body = {"model": "scripted", "messages": [{"role": "user", "content": f"question {number}"}]}
            line = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def run(settings: Settings, file: Path) -> tuple[float, float]:
    """Submit and wait: seconds until the last result, and the share of the time in which the last 5% ended."""
    database = Database(settings.require_postgres())
    try:
        batch_id = stored(database, file, as_submitted(settings), cache=CacheMode.EXACT)
        started = time.monotonic()
        ended(database, batch_id, poll_s=POLL_S)
        seconds = time.monotonic() - started
        span_s, tail_s = result_times(database, batch_id)
    finally:
        database.close()
    return seconds, tail_s / span_s


if __name__ == "__main__":
    main()
