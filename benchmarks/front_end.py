"""vLLM's `/v1/chat/completions/batch` beside single requests: groups of chats with equal parameters, 8 tokens each.

    python -m benchmarks.front_end [--jobs 256] [--group 16] [--pairs 5]

One server, our client, as many conversations in flight on either side, by turns. Worth using from WORTH_IT on.
Writes benchmarks/results/front_end.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.paired import PAIRS, Ratio, by_turns, keep_run, made_with
from benchmarks.rows import Row, bold
from benchmarks.workloads import PATH, Workload, bodies_of
from inference.endpoint import Endpoint
from inference.engines import plan_engine
from inference.supervisor import EngineSupervisor
from runtime.settings import load_settings

BATCH_PATH: Final = "/v1/chat/completions/batch"
OUTPUT_TOKENS: Final = 8
WORTH_IT: Final = 1.1


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=256)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    settings = load_settings().engine
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_engine(settings, socket=Path(folder) / "engine.sock")
        if plan is None or plan.kind != "vllm":
            raise SystemExit(
                "this benchmark starts vLLM itself: `make engine-vllm checkpoint`, and set no other engine"
            )
        log = Path(folder) / "engine.log"
        with EngineSupervisor(plan, log_file=log, start_timeout_s=900, stall_s=120) as engine:
            rates = _rates(plan.url, plan.alias, 2 * plan.slots, options)
    ratio = Ratio.of(rates["batch"], rates["single"])
    report: dict[str, Any] = {
        "made_with": made_with("httptools"),
        "engine": {**plan.description, "version": engine.version},
    }
    report |= {"jobs": options.jobs, "group": options.group, "output_tokens": OUTPUT_TOKENS}
    row = Row(
        f"vLLM's batch route, {options.group} chats of {OUTPUT_TOKENS} tokens a request ÷ single requests: not used, "
        f"would be from {WORTH_IT} on (docs/decisions/0016)",
        bold(ratio),
        "`make bench-front-end`",
    )
    report |= {"jobs_per_s": rates, "ratio": asdict(ratio), "table": [row.as_json()]}
    print(f"{row.figure}: {row.measured}")
    keep_run("front_end", report, parser, options)


def _rates(url: str, model: str, in_flight: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Jobs a second of each side; a leg of each, not counted, warms the engine."""
    legs = count(1)

    def side(group: int) -> Callable[[], float]:
        return lambda: uvloop.run(_leg(url, model, leg=next(legs), jobs=options.jobs, group=group, in_flight=in_flight))

    sides = {"single": side(1), "batch": side(options.group)}
    by_turns(sides, pairs=1)
    return by_turns(sides, pairs=options.pairs)


async def _leg(url: str, model: str, *, leg: int, jobs: int, group: int, in_flight: int) -> float:
    bodies = list(bodies_of(Workload("front end", jobs, (OUTPUT_TOKENS,)), model=model, leg=leg))
    path, asked = (PATH, bodies) if group == 1 else (BATCH_PATH, _grouped(bodies, group))
    connections = max(1, in_flight // group)
    async with Endpoint(url, api_key=None, timeout_s=3600, connections=connections) as endpoint:

        async def ask(number: int, body: dict[str, Any]) -> int:
            reply = await endpoint.post(path, json.dumps(body).encode(), request_id=f"leg-{leg}-{number}")
            return int(json.loads(reply.body)["usage"]["completion_tokens"])

        started = time.monotonic()
        tokens = sum(await asyncio.gather(*(ask(number, body) for number, body in enumerate(asked))))
        seconds = time.monotonic() - started
    if tokens != jobs * OUTPUT_TOKENS:
        raise SystemExit(f"{path} wrote {tokens} tokens, not {jobs * OUTPUT_TOKENS}")
    return jobs / seconds


def _grouped(bodies: list[dict[str, Any]], group: int) -> list[dict[str, Any]]:
    groups = [bodies[start : start + group] for start in range(0, len(bodies), group)]
    return [{**together[0], "messages": [body["messages"] for body in together]} for together in groups]


if __name__ == "__main__":
    main()
