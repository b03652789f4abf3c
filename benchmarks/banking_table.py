"""BANKING77 as a table through one command and through the client: seconds, accuracy, what came from a cache.

    python -m benchmarks.banking_table --folder BANKING77 [--rows 3080] [--semantic 4000]

The rows of test.csv as Parquet, classified into the 77 intents by the small checkpoint on vLLM: by `stoker run`, then,
with the caches cleared, by `stoker_client.run` with pandas; then by the client as a new batch, with what is cached. At
last 4,000 of all rows in a seeded order with `--cache semantic`. One worker, one engine; services are embedded ones in
a folder of their own. About 15 minutes on two cores. Writes benchmarks/results/banking_table.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import stoker_client

from benchmarks.banking77 import read_lines
from benchmarks.paired import keep_run, made_with
from benchmarks.rows import Row
from inference.checkpoints import alias_of
from pipeline.keys import ensure_first_key
from runtime.settings import Settings, environment_of, load_settings
from scripts.local import local_gateway, local_services, local_worker, prepare_schema
from scripts.lookup import opened_database
from tests.support.own_services import free_port, server_folder

COMMAND: Final = "`make bench-tables FOLDER=banking77`"
CHECKPOINT: Final = Path(".checkpoints") / "smollm2-135m-w8a8"
PROMPT: Final = "A bank's customer writes: {text}\nWhat is it about?"
TEST_ROWS: Final = 3_080
STOKER: Final = Path(sys.executable).with_name("stoker")


@dataclass(frozen=True, slots=True)
class Run:
    """One pass: `accuracy` of the rows that were answered, `cached` the share that no engine was asked for."""

    rows: int
    seconds: float
    accuracy: float
    cached: float
    errors: int
    sources: dict[str, int]


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=TEST_ROWS)
    parser.add_argument("--semantic", type=int, default=4_000)
    options = parser.parse_args()
    texts, intents = read_lines(options.folder)
    every = pd.DataFrame({"text": texts, "intent": intents})
    given = load_settings()
    engine = given.engine.model_copy(update={"kind": "vllm", "checkpoint": CHECKPOINT})
    gateway = given.gateway.model_copy(update={"port": free_port()})
    with server_folder() as folder:
        fresh = given.model_copy(update={"engine": engine, "gateway": gateway, "home": folder / "home"})
        with local_services(fresh, with_chroma=True) as settings:
            prepare_schema(settings)
            with local_worker(settings), local_gateway(settings):
                found = measured(settings, folder, every, rows=options.rows, semantic=options.semantic)
    report = {
        "made_with": made_with("pandas", "pyarrow", "stoker-client"),
        "checkpoint": CHECKPOINT.name,
        "labels": len(set(intents)),
        "runs": {name: asdict(run) for name, run in found.items()},
        "table": [row.as_json() for row in rows(found)],
    }
    print(json.dumps(report, indent=2))
    options.folder = parser.get_default("folder")  # where the rows lie is not what was measured
    keep_run("banking_table", report, parser, options)


def measured(settings: Settings, folder: Path, every: pd.DataFrame, *, rows: int, semantic: int) -> dict[str, Run]:
    """All passes over one worker."""
    labels = sorted(set(every["intent"]))
    (folder / "labels.txt").write_text("\n".join(labels))
    table = every.iloc[-TEST_ROWS:].head(rows).reset_index(drop=True)
    with opened_database(settings) as database:
        key = ensure_first_key(database, folder / "key")
    asked = {
        "prompt": PROMPT,
        "labels": labels,
        "model": alias_of(CHECKPOINT),
        "base_url": f"http://127.0.0.1:{settings.gateway.port}/v1",
        "api_key": key,
    }
    found = {"command": by_command(settings, folder, table, cache="exact")}
    stoker(settings, "cache", "clear")
    found["client"] = by_client(table, asked)
    found["client, cached"] = by_client(table, asked | {"resume": False})
    order = list(range(len(every)))
    random.Random(0).shuffle(order)
    stoker(settings, "cache", "clear")
    shuffled = every.iloc[order[:semantic]].reset_index(drop=True)
    found["command, semantic"] = by_command(settings, folder, shuffled, cache="semantic")
    return found


def by_command(settings: Settings, folder: Path, table: pd.DataFrame, *, cache: str) -> Run:
    """`stoker run` from Parquet to Parquet."""
    path, output = folder / "in.parquet", folder / "out.parquet"
    table.to_parquet(path)
    begun = time.monotonic()
    stoker(
        settings,
        "run",
        path,
        "--prompt",
        PROMPT,
        "--labels",
        f"@{folder / 'labels.txt'}",
        "--cache",
        cache,
        "-o",
        output,
    )
    return run_of(pd.read_parquet(output), time.monotonic() - begun)


def by_client(table: pd.DataFrame, asked: dict[str, Any]) -> Run:
    """`stoker_client.run` from frame to frame."""
    begun = time.monotonic()
    answered = stoker_client.run(table, progress=False, **asked)
    return run_of(answered, time.monotonic() - begun)


def run_of(answered: pd.DataFrame, seconds: float) -> Run:
    """What a pass gave."""
    print(answered.head(3).to_string(), flush=True)
    sources = Counter(answered["source"].fillna("none"))
    cached = sum(count for source, count in sources.items() if source not in ("engine", "none"))
    return Run(
        rows=len(answered),
        seconds=round(seconds, 1),
        accuracy=round(float((answered["answer"] == answered["intent"]).mean()), 4),
        cached=round(cached / len(answered), 4),
        errors=int(answered["error"].notna().sum()),
        sources=dict(sources),
    )


def stoker(settings: Settings, *arguments: str | Path) -> None:
    """`stoker …` to its end; jobs may fail."""
    env = {**os.environ, **environment_of(settings)}
    ended = subprocess.run([str(STOKER), *map(str, arguments)], env=env, check=False)
    if ended.returncode not in (0, 1):
        raise SystemExit(f"stoker {arguments[0]} ended with status {ended.returncode}")


def rows(found: dict[str, Run]) -> Sequence[Row]:
    """One row a pass."""
    return [
        Row(
            f"BANKING77 as a table, {run.rows:,} rows into 77 labels, {name}: seconds; right; from a cache",
            f"**{run.seconds:,.0f} s**; {run.accuracy:.1%}; **{run.cached:.1%}**; {run.errors} rows with an error",
            COMMAND,
            headline=True,
        )
        for name, run in found.items()
    ]


if __name__ == "__main__":
    main()
