"""How many requests at once an endpoint bears, and where the window settles that finds it out by itself.

    python -m benchmarks.knee [--leg-s 5] [--window-s 300]

First the throughput with 1, 2, 4, … 256 requests at once, each held for a while; then one window from its start. Two
scripted endpoints whose knees are known, their service times lognormal, and a real engine: vLLM where its environment
exists, else llama.cpp, answers of 8 to 32 tokens. The figures of a real engine are noisy where a machine is shared.
About 9 minutes. Writes benchmarks/results/knee.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.paired import keep_run, made_with
from benchmarks.rows import Row
from benchmarks.workloads import PATH
from inference.concurrency import Window
from inference.endpoint import Endpoint
from inference.engines import plan_engine
from inference.replies import result_of
from inference.supervisor import EngineSupervisor
from runtime.settings import load_settings
from tests.support.scripted_endpoint import ScriptedEndpoint

AT_ONCE: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PLACES: Final = (16, 64)  # of the scripted endpoints
MEDIAN_S, SIGMA = 0.05, 0.6
LEAST_JOBS: Final = 24  # however slow
LEG_JOBS, WINDOW_JOBS = 3000, 10_000  # are enough, however fast
OUTPUT_TOKENS: Final = (8, 16, 24, 32)
COMMAND: Final = "`make bench-knee`"
WORTH: Final = 0.9  # target: of the most that any fixed number at once gives


@dataclass(frozen=True, slots=True)
class Held:
    """What so many requests at once gave; seconds are the median time of a request."""

    at_once: int
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Settled:
    """`size` is what the window has settled on, `sizes` its way there: (seconds, size) of each change.

    `tokens_per_s` is of the second half of the completions, looks at the base included.
    """

    size: int
    tokens_per_s: float
    sizes: list[tuple[float, int]]


def main() -> None:
    """Measure the curve and the window on each endpoint, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leg-s", type=float, default=5.0, help="seconds that each number at once is held, at most")
    parser.add_argument("--window-s", type=float, default=300.0, help="the same of the window")
    options = parser.parse_args()
    cases = []
    for places in PLACES:
        with ScriptedEndpoint(latency_s=MEDIAN_S, latency_sigma=SIGMA, slots=places) as server:
            found = uvloop.run(measured(server.url, scripted_bodies(), options))
        cases.append({"endpoint": "scripted", "places": places, **found})
        show(cases[-1])
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_engine(load_settings().engine, socket=Path(folder) / "engine.sock")
        if plan is None:
            raise SystemExit("this benchmark starts its engine itself: set no STOKER_ENGINE__URL, and no kind `none`")
        with EngineSupervisor(plan, log_file=Path(folder) / "log", start_timeout_s=900, stall_s=120) as engine:
            bodies = engine_bodies(plan.alias)
            found = uvloop.run(measured(plan.url, bodies, options))
            described = {**plan.description, "version": engine.version}
    cases.append({"endpoint": plan.kind, "places": plan.slots, "engine": described, **found})
    show(cases[-1])
    report = {"made_with": made_with("httptools"), "output_tokens": OUTPUT_TOKENS, "cases": cases}
    report["table"] = [row.as_json() for row in rows(cases)]
    keep_run("knee", report, parser, options)


async def measured(url: str, bodies: Iterator[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """The curve of fixed numbers at once, and the window on the same endpoint."""
    async with Endpoint(url, api_key=None, timeout_s=3600, connections=2 * max(AT_ONCE)) as endpoint:
        await held(endpoint, bodies, 8, seconds=options.leg_s / 4)  # warm
        curve = []
        for size in AT_ONCE:
            curve.append(await held(endpoint, bodies, size, seconds=options.leg_s))
            print(f"  {size:>4} {curve[-1].tokens_per_s:>10,.1f} {curve[-1].seconds:>8.3f}", flush=True)
        settled = await found_out(endpoint, bodies, seconds=options.window_s)
    return {"curve": [asdict(one) for one in curve], "window": asdict(settled)}


async def held(endpoint: Endpoint, bodies: Iterator[bytes], size: int, *, seconds: float) -> Held:
    """Keep so many at once; the first third of the time does not count."""
    ended: list[tuple[float, float, int]] = []
    began = time.monotonic()
    await keep_full(endpoint, bodies, lambda: size, lambda *one: ended.append(one), jobs=LEG_JOBS, seconds=seconds)
    first = next((at for at, _, _ in ended if at > began + (ended[-1][0] - began) / 3), ended[0][0])
    counted = [one for one in ended if one[0] > first]
    rate = sum(tokens for _, _, tokens in counted) / (counted[-1][0] - first)
    return Held(size, round(rate, 1), round(statistics.median(took_s for _, took_s, _ in counted), 3))


async def found_out(endpoint: Endpoint, bodies: Iterator[bytes], *, seconds: float) -> Settled:
    """Let a window say how many at once."""
    window = Window(most=max(AT_ONCE))
    began = time.monotonic()
    sizes = [(0.0, window.size)]
    ended: list[tuple[float, int]] = []

    def note(at: float, took_s: float, tokens: int) -> None:
        window.ended(took_s, tokens)
        ended.append((at, tokens))
        if window.size != sizes[-1][1]:
            sizes.append((round(at - began, 2), window.size))

    await keep_full(endpoint, bodies, lambda: window.size, note, jobs=WINDOW_JOBS, seconds=seconds)
    last = ended[len(ended) // 2 :]
    rate = sum(tokens for _, tokens in last[1:]) / (last[-1][0] - last[0][0])
    return Settled(window.settled, round(rate, 1), sizes)


async def keep_full(
    endpoint: Endpoint,
    bodies: Iterator[bytes],
    size: Callable[[], int],
    note: Callable[[float, float, int], None],
    *,
    jobs: int,
    seconds: float,
) -> None:
    """Keep as many requests under way as `size` says, until `jobs` have ended or the time is over, and LEAST_JOBS.

    Those that are under way then are waited for.

    `note` hears of each the moment of its end, its seconds and its tokens.
    """
    running: set[asyncio.Task[None]] = set()
    has_ended = asyncio.Event()
    noted, end = 0, time.monotonic() + seconds

    async def ask(body: bytes) -> None:
        nonlocal noted
        began = time.monotonic()
        reply = await endpoint.post(PATH, body, request_id="knee")
        now = time.monotonic()
        if noted < jobs and (now < end or noted < LEAST_JOBS):
            noted += 1
            note(now, now - began, result_of(0, PATH, reply).usage.completion_tokens)
        has_ended.set()

    while noted < jobs and (time.monotonic() < end or noted < LEAST_JOBS):
        while len(running) < size():
            task = asyncio.create_task(ask(next(bodies)))
            running.add(task)
            task.add_done_callback(running.discard)
        has_ended.clear()
        await has_ended.wait()
        await asyncio.sleep(0)  # the task's end is noticed
    await asyncio.gather(*running)


def scripted_bodies() -> Iterator[bytes]:
    """Chats, all different: the endpoint draws the service time from the prompt."""
    for number in count():
        body = {"model": "scripted", "messages": [{"role": "user", "content": f"question {number}"}]}
        yield json.dumps(body).encode()


def engine_bodies(model: str) -> Iterator[bytes]:
    """Short chats, all different, whose answers are exactly so long."""
    for number in count():
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"{number}: say something"}],
            "max_tokens": OUTPUT_TOKENS[number % len(OUTPUT_TOKENS)],
            "temperature": 0,
            "ignore_eos": True,
        }
        yield json.dumps(body).encode()


def show(case: dict[str, Any]) -> None:
    """Print what the window found, below the curve: numbers at once, tokens/s, seconds."""
    window = case["window"]
    way = " ".join(str(size) for _, size in window["sizes"])
    where = f"{case['endpoint']}, {case['places']} places"
    print(f"{where}: the window: {window['size']}, {window['tokens_per_s']:,.1f} tokens/s; its way: {way}", flush=True)


def rows(cases: list[dict[str, Any]]) -> list[Row]:
    """What the window settles on where the knee is known, and what it gives everywhere."""
    found = []
    for case in cases:
        size, places = case["window"]["size"], case["places"]
        most = max(one["tokens_per_s"] for one in case["curve"])
        share = case["window"]["tokens_per_s"] / most
        where = f"{case['endpoint']} endpoint with {places} places"
        if case["endpoint"] == "scripted":
            judged: dict[str, Any] = {"target": "1 to 2", "is_met": places <= size <= 2 * places}
            figure = f"requests at once that the window settles on ÷ the knee: {where}"
            found.append(Row(figure, f"**{size / places:.2f}**", COMMAND, **judged))
        found.append(
            Row(
                f"throughput where the window settles ({size} at once) ÷ the most of any fixed number at once: {where}",
                f"**{share:.2f}**",
                COMMAND,
                target=f"≥ {WORTH}",
                is_met=share >= WORTH,
            )
        )
    return found


if __name__ == "__main__":
    main()
