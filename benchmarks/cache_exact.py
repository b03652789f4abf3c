"""The exact cache on a batch with duplicates: calls of the engine, and jobs a second, cold, warm and without it.

    python -m benchmarks.cache_exact [--lines 100000] [--duplicates 0.3]

The services that the settings name or embedded ones, one real worker, a scripted engine that answers at once and counts
its calls. The same lines run four times: without the cache, with it empty, once more, and again without it, because the
machine is shared. A duplicate stands anywhere in the file. Every answer is compared with what the engine says
to its own line.
Writes benchmarks/results/cache_exact.json.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from benchmarks.own_batch import ended, stored
from benchmarks.paired import keep, made_with
from models.states import CacheMode
from pipeline.export import write_lines
from runtime.settings import Settings, load_settings
from scripts.local import local_services, local_worker, prepare_schema
from store.database import Database
from tests.support.own_services import server_folder
from tests.support.scripted_endpoint import ScriptedEndpoint

LEGS: Final = {
    "off": CacheMode.OFF,
    "cold": CacheMode.EXACT,
    "warm": CacheMode.EXACT,
    "off again": CacheMode.OFF,
}
POLL_S: Final = 0.25


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--duplicates", type=float, default=0.3, help="share of the lines that an equal one precedes")
    options = parser.parse_args()
    prompts = drawn_prompts(options.lines, duplicates=options.duplicates)
    rows: dict[str, dict[str, Any]] = {}
    with server_folder() as folder, ScriptedEndpoint() as endpoint, local_services(_in(folder / "home")) as settings:
        prepare_schema(settings)
        served = settings.model_copy(update={"engine": settings.engine.model_copy(update={"url": endpoint.url})})
        file = write_file(folder / "lines.jsonl", prompts)
        with local_worker(served):
            for name, mode in LEGS.items():
                rows[name] = run(served, endpoint, file, prompts, mode=mode)
                print(name, json.dumps(rows[name]), flush=True)
    off_s = (rows["off"]["s"] + rows["off again"]["s"]) / 2
    report = {
        "made_with": made_with(),
        "lines": len(prompts),
        "different": len(set(prompts)),
        "rows": rows,
        "ratio_to_off": {name: round(off_s / rows[name]["s"], 2) for name in ("cold", "warm")},
    }
    keep("cache_exact", report)
    print(json.dumps(report["ratio_to_off"]))


def _in(home: Path) -> Settings:
    """The settings with a home of their own: embedded services begin with nothing."""
    return load_settings().model_copy(update={"home": home})


def drawn_prompts(count: int, *, duplicates: float) -> list[str]:
    """As many prompts, of which this share repeats others; new to any cache of an earlier run."""
    draw, run_name = random.Random(0), secrets.token_hex(4)
    different = [f"{run_name} question {number}" for number in range(round(count * (1 - duplicates)))]
    prompts = different + draw.choices(different, k=count - len(different))
    draw.shuffle(prompts)
    return prompts


def write_file(path: Path, prompts: list[str]) -> Path:
    """Deterministic chats, `q-0` and so on."""
    with path.open("w") as opened:
        for number, prompt in enumerate(prompts):
            body = {"model": "scripted", "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
            line = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def run(
    settings: Settings, endpoint: ScriptedEndpoint, file: Path, prompts: list[str], *, mode: CacheMode
) -> dict[str, Any]:
    """Submit and wait. `s` runs from the start of the submit to the last result, which a follower may have there."""
    database = Database(settings.require_postgres())
    calls_before = endpoint.calls().count
    try:
        began = time.monotonic()
        batch_id = stored(database, file, settings, cache=mode)
        stored_s = time.monotonic() - began
        ended(database, batch_id, poll_s=POLL_S)
        seconds = time.monotonic() - began
        sources, wrong = checked(database, batch_id, prompts)
    finally:
        database.close()
    return {
        "calls": endpoint.calls().count - calls_before,
        "s": round(seconds, 2),
        "submit_s": round(stored_s, 2),
        "jobs_per_s": round(len(prompts) / seconds),
        "jobs_per_s_after_submit": round(len(prompts) / (seconds - stored_s)),
        "sources": sources,
        "wrong_or_missing": wrong,
    }


def checked(database: Database, batch_id: UUID, prompts: list[str]) -> tuple[dict[str, int], int]:
    """Where the answers came from, and how many lines have none or another line's."""
    written = BytesIO()
    write_lines(database, batch_id, output=written, errors=None)
    sources: Counter[str] = Counter()
    right = 0
    for line in written.getvalue().splitlines():
        result = json.loads(line)
        prompt = prompts[int(result["custom_id"].removeprefix("q-"))]
        right += result["response"]["body"]["choices"][0]["message"]["content"] == f"echo: {prompt}"
        sources[result["stoker"]["source"]] += 1
    return dict(sources), len(prompts) - right


if __name__ == "__main__":
    main()
