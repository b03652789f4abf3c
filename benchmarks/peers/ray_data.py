"""The same prompts through Ray Data, in an environment of its own (`make ray-env`, requirements/ray.txt).

    .venv-ray/bin/python -m benchmarks.peers.ray_data --folder parts/ --database URL --endpoint URL --temporary DIR

`ray.data.read_json` → `map_batches` with an async actor (aiohttp, 64 requests at once, its connections kept open) →
`map_batches` that writes each batch with one COPY into a table like `results`. What was chosen:
- Two actors with 64 requests each, as our two pool processes have; batches of 64 rows.
- Its client is aiohttp, as users would take it; ours costs about a third of that a request (docs/decisions/0017).
- In its favour: no durability a job. Ray keeps which block is done in memory; a job that is lost with its process runs
  again only as part of its block, and a restart of the driver runs all again. Nothing is written but the results.
- Its time runs from the first batch that reaches an actor to the last COPY, with Ray up and the actors started.
It prints one line of JSON. It must not import the rest of the project: another environment runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import psycopg
import ray

ACTORS, IN_FLIGHT, BATCH = 2, 64, 64
COPY = (
    "COPY peer_results (batch_id, seq, outcome, source, status_code, response, prompt_tokens, completion_tokens, "
    "cached_tokens, reasoning_tokens, duration_ms) FROM STDIN"
)


class Asker:
    """An actor: one session, made on its own loop at its first batch."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.session: aiohttp.ClientSession | None = None
        self.free = asyncio.Semaphore(IN_FLIGHT)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        began = time.time()
        if self.session is None:
            headers = {"Content-Type": "application/json"}
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers=headers, cookie_jar=aiohttp.DummyCookieJar()
            )
        answers = await asyncio.gather(*(self.ask(body) for body in batch["body"]))
        rows = len(answers)
        yield {
            "custom_id": batch["custom_id"],
            "status": np.array([status for status, _ in answers]),
            "response": np.array([text for _, text in answers], dtype=object),
            "began": np.full(rows, began),
        }

    async def ask(self, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of one answer."""
        assert self.session is not None
        async with (
            self.free,
            self.session.post(f"{self.endpoint}/chat/completions", data=json.dumps(body)) as response,
        ):
            return response.status, await response.text()


class Writer:
    """An actor with a connection: one COPY, committed, a batch."""

    def __init__(self, database: str, batch_id: str) -> None:
        self.connection = psycopg.connect(database)
        self.batch_id = batch_id

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.connection.cursor().copy(COPY) as copy:
            for name, status, text in zip(batch["custom_id"], batch["status"], batch["response"], strict=True):
                usage = json.loads(text)["usage"]
                seq = int(name.rpartition("-")[2])
                counts = (usage["prompt_tokens"], usage["completion_tokens"], 0, 0, 0)
                copy.write_row((self.batch_id, seq, "succeeded", "engine", int(status), text, *counts))
        self.connection.commit()
        return {
            "began": np.array([batch["began"].min()]),
            "ended": np.array([time.time()]),
            "rows": np.array([len(batch["status"])]),
        }


def main() -> None:
    """Run it once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", required=True, help="batch files; Ray reads a file in one task and sends its rows to one actor"
    )
    parser.add_argument("--database", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--temporary", required=True, help="of Ray's own files; a short path")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # As many task slots as the actors and readers take, whatever cores the process is pinned to.
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=options.temporary,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    pool = ray.data.ActorPoolStrategy
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    batch_id = str(uuid.uuid4())
    written = (
        ray.data.read_json(options.folder, lines=True)
        .map_batches(Asker, fn_constructor_args=(options.endpoint,), compute=pool(size=ACTORS), batch_size=BATCH)
        .map_batches(Writer, fn_constructor_args=(options.database, batch_id), compute=pool(size=1), batch_size=1024)
        .take_all()
    )
    rows = int(sum(row["rows"] for row in written))
    seconds = max(row["ended"] for row in written) - min(row["began"] for row in written)
    ray.shutdown()
    print(json.dumps({"jobs": rows, "seconds": seconds, "ray": ray.__version__}))


if __name__ == "__main__":
    main()
