"""Starvation: the share of an engine's slots that stand empty while the batch still has jobs to send.

    python -m benchmarks.refill [--slots 2048] [--children 4] [--jobs 30000]

One scripted engine whose service times are lognormal, one real worker, the services that the settings name or embedded
ones. The engine itself adds up how long its slots are taken, from the first request to the last one's arrival, the
ramp at the start included. Writes benchmarks/results/refill.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.paired import made_with
from models.lines import SubmitOptions
from pipeline.submit import submit_file
from runtime.settings import Settings, load_settings
from scripts.local import local_services, local_worker, prepare_schema
from store.batches import batch_progress
from store.database import Database
from tests.support.scripted_endpoint import Calls, ScriptedEndpoint

RESULT = Path(__file__).parent / "results" / "refill.json"
TENANT = "local"


def main() -> None:
    """Measure each ratio of jobs in flight to slots, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--children", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=30_000)
    parser.add_argument("--median-s", type=float, default=4.0)
    parser.add_argument("--sigma", type=float, default=0.6)
    options = parser.parse_args()
    rows = []
    with local_services(load_settings()) as settings:
        prepare_schema(settings)
        for in_flight in (options.slots, 2 * options.slots):
            rows.append(measured(settings, options, in_flight=in_flight))
            print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(json.dumps({"made_with": made_with(), "rows": rows}, indent=2) + "\n")


def measured(settings: Settings, options: argparse.Namespace, *, in_flight: int) -> dict[str, Any]:
    """One batch through one worker."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ScriptedEndpoint(latency_s=options.median_s, latency_sigma=options.sigma, slots=options.slots) as endpoint,
    ):
        worker = settings.worker.model_copy(
            update={"children": options.children, "in_flight": in_flight // options.children}
        )
        engine = settings.engine.model_copy(update={"url": endpoint.url})
        served = settings.model_copy(update={"worker": worker, "engine": engine})
        file = write_file(Path(folder) / "lines.jsonl", count=options.jobs)
        with local_worker(served):
            calls, seconds = run(served, endpoint, file)
    return {
        "slots": options.slots,
        "in_flight": in_flight,
        "children": options.children,
        "jobs": options.jobs,
        "service_median_s": options.median_s,
        "service_sigma": options.sigma,
        "most_running": calls.most_running,
        "seconds_until_the_last_arrival": round(calls.arrival_s, 1),
        "seconds_until_the_last_result": round(seconds, 1),
        "starvation": round(1 - calls.slot_seconds / (options.slots * calls.arrival_s), 4),
    }


def write_file(path: Path, *, count: int) -> Path:
    """As many chats, all different."""
    with path.open("w") as opened:
        for number in range(count):
            body = {"model": "scripted", "messages": [{"role": "user", "content": f"question {number}"}]}
            line = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def run(settings: Settings, endpoint: ScriptedEndpoint, file: Path) -> tuple[Calls, float]:
    """Submit and wait: what the engine saw, and the seconds from the submit to the last result."""
    database = Database(settings.require_postgres())
    try:
        submitted = submit_file(
            database,
            file,
            options=SubmitOptions(max_output_tokens=64),
            settings=settings,
            served_models=None,
            reuse=False,
            tenant=TENANT,
        )
        started = time.monotonic()
        while True:
            with database.transaction() as session:
                if batch_progress(session, submitted.batch_id, tenant=TENANT).is_ended:
                    return endpoint.calls(), time.monotonic() - started
            time.sleep(0.5)
    finally:
        database.close()


if __name__ == "__main__":
    main()
