"""What a batch that really ran on an engine here costs beside a managed API, and when the engine is the cheaper way.

    python -m benchmarks.break_even [--jobs 400] [--idle-share 0.5] [--hour-price 0.0893] [--input-price 0.1]
        [--output-price 0.4] [--cached-price 0.025]

One worker starts vLLM and runs a batch of a shop's chats through the whole system; `stoker cost` tells of it. Then a
worker holds the same engine without work, for `--idle-share` of the time that the first took, and `stoker cost` tells
of both. Prices are stated, not looked up: an hour of two cores as clouds rent them, a million tokens of a small model
as managed APIs ask. The engine's own model is far smaller than theirs: what is compared is money for tokens, not what
they are worth. Writes benchmarks/results/break_even.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from benchmarks.batch_lines import bodies, write_lines
from benchmarks.order import MODEL
from benchmarks.own_batch import ended, stored
from benchmarks.paired import keep_run, made_with
from benchmarks.place import as_submitted, own_place
from benchmarks.rows import Row
from inference.engines import plan_engine
from models.names import batch_name
from runtime.settings import CostSettings, Settings, environment_of
from scripts.local import local_worker
from scripts.shown_batch import seconds_of
from store.batches import BatchProgress
from store.database import Database

COMMAND: Final = "`make bench-break-even`"
POLL_S: Final = 0.5
SLOTS: Final = 16  # on two cores more of them are no faster
STOKER: Final = Path(sys.executable).with_name("stoker")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--idle-share", type=float, default=0.5)
    parser.add_argument("--hour-price", type=Decimal, default=Decimal("0.0893"))
    parser.add_argument("--input-price", type=Decimal, default=Decimal("0.1"))
    parser.add_argument("--output-price", type=Decimal, default=Decimal("0.4"))
    parser.add_argument("--cached-price", type=Decimal, default=Decimal("0.025"))
    options = parser.parse_args()
    report: dict[str, Any] = {"made_with": made_with("celery"), "options": _as_json(options)}
    with own_place() as place, tempfile.TemporaryDirectory() as folder:
        settings = priced(place.settings, options)
        plan = plan_engine(settings.engine, socket=Path("engine.sock"))
        assert plan is not None
        report |= {"servers": place.versions(), "engine": dict(plan.description)}
        began = time.monotonic()
        with local_worker(settings):
            progress = run_batch(settings, Path(folder) / "lines.jsonl", jobs=options.jobs)
        name, seconds = batch_name(progress.id), seconds_of(progress)
        report["batch"] = {"seconds": round(seconds, 1), "tokens_per_s": round(progress.completion_tokens / seconds, 1)}
        report["after_the_batch"] = told(settings, name)
        idle_s = options.idle_share * (time.monotonic() - began)
        with local_worker(settings):
            time.sleep(idle_s)
        report["after_idling"] = told(settings, "--by", "day")
    report["table"] = [row.as_json() for row in rows_of(report)]
    keep_run("break_even", report, parser, options)


def priced(settings: Settings, options: argparse.Namespace) -> Settings:
    """A worker with a vLLM whose hour has a price, and what a managed API asks."""
    changed = {"kind": "vllm", "url": None, "max_num_seqs": SLOTS, "hour_price": options.hour_price}
    cost = CostSettings(
        managed_input_price=options.input_price,
        managed_output_price=options.output_price,
        managed_cached_price=options.cached_price,
    )
    return settings.model_copy(update={"engine": settings.engine.model_copy(update=changed), "cost": cost})


def run_batch(settings: Settings, file: Path, *, jobs: int) -> BatchProgress:
    """The batch at its end; SystemExit if a job failed."""
    write_lines(file, bodies(jobs, model=MODEL))
    database = Database(settings.require_postgres())
    try:
        progress = ended(database, stored(database, file, as_submitted(settings, is_fresh=True)), poll_s=POLL_S)
    finally:
        database.close()
    if progress.failed:
        raise SystemExit(f"{progress.failed} of {progress.total} jobs failed")
    return progress


def told(settings: Settings, *arguments: str) -> dict[str, Any]:
    """What `stoker cost` says, as people and as programs read it."""
    text = _stoker_cost(settings, *arguments)
    print(text, flush=True)
    return {
        "command": " ".join(["stoker cost", *arguments]),
        "text": text.splitlines(),
        "report": json.loads(_stoker_cost(settings, *arguments, "--json")),
    }


def rows_of(report: dict[str, Any]) -> list[Row]:
    """The figures of the table."""
    options = report["options"]
    rows = []
    for key, load in (("after_the_batch", "a batch, the engine's start counted in"), ("after_idling", "then idle")):
        found = report[key]["report"]
        own, managed = found["comparison"]["own"], found["comparison"]["managed"]
        rows.append(
            Row(
                f"{options['jobs']:,} chats on {report['engine']['checkpoint']}, {load}: own engine ÷ managed API in "
                f"money, at {options['hour_price']} an hour and {options['input_price']}/{options['output_price']} a "
                "million tokens in/out; used and break-even share of its slots",
                f"**{own / managed:.2f}**; {found['comparison']['utilisation']:.1%} and "
                f"{found['comparison']['break_even']:.1%}",
                COMMAND,
            )
        )
    return rows


def _stoker_cost(settings: Settings, *arguments: str) -> str:
    env = {**os.environ, **environment_of(settings), "COLUMNS": "140"}
    asked = subprocess.run([str(STOKER), "cost", *arguments], env=env, stdout=subprocess.PIPE, text=True, check=False)
    if asked.returncode:
        raise SystemExit(f"stoker cost ended with status {asked.returncode}")
    return asked.stdout


def _as_json(options: argparse.Namespace) -> dict[str, Any]:
    return {name: float(value) if isinstance(value, Decimal) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    main()
