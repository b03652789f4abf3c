"""The whole system against the bare engine, on the same prompts, in one run.

    python -m benchmarks.end_to_end --csv QUERIES.csv [--lines 2000] [--pairs 2]

Starts one engine, then by turns (A B B A …) sends the prompts straight to it and through submit, RabbitMQ, a real
Celery worker and Postgres, with the same number of requests in flight. The CSV needs a column `text`. A pass over
the prompts before the first turn warms the engine, its prefix cache included, for both sides alike.
Through the system, time runs from the batch's first second in progress to its last durable result.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from inference.endpoint import Endpoint
from inference.engines import plan_engine
from inference.replies import result_of
from inference.supervisor import EngineSupervisor
from models.jobs import JobResult
from models.lines import SubmitOptions
from pipeline.submit import submit_file
from runtime.clock import utc_now
from runtime.settings import Settings, load_settings
from scripts.local import local_worker, prepare_schema
from scripts.terminal import seconds_of
from store.batches import BatchProgress, batch_progress
from store.database import Database

PATH = "/v1/chat/completions"
INSTRUCTION = (
    "You sort messages that customers send to a bank. Answer with the one topic that fits best and nothing else. "
    "The topics are: card arrival, card payment, cash withdrawal, exchange rate, top up, transfer, identity check, "
    "lost or stolen card, PIN, refund, fees, account settings, other."
)


def main() -> None:
    """Run the benchmark, print its table and write benchmarks/results/end_to_end.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--output-tokens", type=int, default=8)
    arguments = parser.parse_args()
    settings = load_settings()
    prepare_schema(settings)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_engine(settings.engine, socket=Path(folder) / "engine.sock")
        if plan is None:
            raise SystemExit("unset STOKER_ENGINE__URL: this benchmark starts the engine itself")
        bodies = read_bodies(
            arguments.csv, lines=arguments.lines, model=plan.alias, output_tokens=arguments.output_tokens
        )
        file = write_file(Path(folder) / "lines.jsonl", bodies)
        engine = EngineSupervisor(plan, log_file=Path(folder) / "engine.log", start_timeout_s=900, stall_s=120)
        engine.start()
        try:
            report = measure(settings, engine.plan.url, bodies, file, pairs=arguments.pairs)
        finally:
            engine.stop()
    report |= {
        "output_tokens": arguments.output_tokens,
        "engine": dict(plan.description) | {"version": engine.version},
        **machine(),
    }
    (Path(__file__).parent / "results" / "end_to_end.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


def read_bodies(path: Path, *, lines: int, model: str, output_tokens: int) -> list[bytes]:
    """One chat request for each of the first `lines` rows; the output length is fixed (ignore_eos)."""
    with path.open(newline="") as opened:
        texts = [row["text"] for row, _ in zip(csv.DictReader(opened), range(lines), strict=False)]
    return [
        json.dumps(
            {
                "model": model,
                "temperature": 0,
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "messages": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}],
            }
        ).encode()
        for text in texts
    ]


def write_file(path: Path, bodies: list[bytes]) -> Path:
    """The same requests as a batch file."""
    with path.open("wb") as opened:
        for number, body in enumerate(bodies):
            opened.write(
                b'{"custom_id":"query-%05d","method":"POST","url":"%s","body":%s}\n' % (number, PATH.encode(), body)
            )
    return path


def measure(settings: Settings, url: str, bodies: list[bytes], file: Path, *, pairs: int) -> dict[str, Any]:
    """Seconds and tokens/s of both sides, in turns."""
    in_flight = 2 * settings.engine.max_num_seqs
    served = settings.model_copy(update={"engine": settings.engine.model_copy(update={"url": url})})
    straight: list[float] = []
    through: list[float] = []
    tokens = 0
    with local_worker(served):
        uvloop.run(ask_straight(url, bodies, in_flight=in_flight))
        for pair in range(pairs):
            for side in ("straight", "through") if pair % 2 == 0 else ("through", "straight"):
                if side == "straight":
                    seconds, tokens = uvloop.run(ask_straight(url, bodies, in_flight=in_flight))
                    straight.append(seconds)
                else:
                    progress = ask_through(served, file)
                    if progress.completion_tokens != tokens and tokens:
                        raise SystemExit(f"tokens differ: {progress.completion_tokens} and {tokens}")
                    through.append(seconds_of(progress))
    ratios = [a / b for a, b in zip(straight, through, strict=True)]
    return {
        "jobs": len(bodies),
        "in_flight": in_flight,
        "tokens": tokens,
        "straight_s": straight,
        "through_s": through,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


async def ask_straight(url: str, bodies: list[bytes], *, in_flight: int) -> tuple[float, int]:
    """(seconds, completion tokens) of all requests sent to the engine with `in_flight` at once."""
    async with Endpoint(url, api_key=None, timeout_s=900, connections=in_flight) as endpoint:

        async def ask(number: int, body: bytes) -> JobResult:
            return result_of(number, PATH, await endpoint.post(PATH, body, request_id=f"straight-{number}"))

        started = time.monotonic()
        results = await asyncio.gather(*(ask(number, body) for number, body in enumerate(bodies)))
        return time.monotonic() - started, sum(result.usage.completion_tokens for result in results)


def ask_through(settings: Settings, file: Path) -> BatchProgress:
    """The batch's end state, once every job has its result."""
    database = Database(settings.require_postgres())
    try:
        submitted = submit_file(
            database,
            file,
            options=SubmitOptions(max_output_tokens=1024),
            settings=settings,
            served_models=None,
            reuse=False,
        )
        while True:
            time.sleep(0.5)
            with database.transaction() as session:
                progress = batch_progress(session, submitted.batch_id, tenant="local")
            if progress.is_ended:
                break
    finally:
        database.close()
    if progress.done != progress.total or progress.failed:
        raise SystemExit(f"{progress.done} of {progress.total} done, {progress.failed} failed")
    return progress


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": utc_now().date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def print_report(report: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{report['jobs']:,} jobs, {report['output_tokens']} output tokens each, {report['in_flight']} in flight, "
        f"{report['engine']['kind']} {report['engine']['version']} {report['engine']['checkpoint']}"
    )
    for name, seconds in (
        ("straight to the engine", report["straight_s"]),
        ("through the system", report["through_s"]),
    ):
        median = statistics.median(seconds)
        print(
            f"{name:24} {median:7.2f} s {report['jobs'] / median:8.1f} jobs/s {report['tokens'] / median:8.1f} tokens/s"
            f"   runs: {', '.join(f'{s:.2f}' for s in seconds)}"
        )
    print(f"ratio {report['ratio']:.3f} (pairs: {', '.join(f'{r:.3f}' for r in report['ratios'])})")


if __name__ == "__main__":
    main()
