"""How long schedules are not looked for when the beat that leads is killed, or Redis is emptied.

    python -m benchmarks.takeover [--runs 5] [--seed 1]

Two control workers, services of their own, a look every STOKER_SCHEDULE__TICK_S, 5 s unless set. At a random moment the
leading beat gets kill -9, then at another Redis gets FLUSHALL; what counts is the time until a beat that did not lead
before does (its line in the log), and until schedules have been looked for again. Nothing that is due meanwhile is
lost: due times are Postgres's. About 3 minutes. Writes benchmarks/results/takeover.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import redis

from benchmarks.paired import keep_run, made_with
from benchmarks.place import own_place
from benchmarks.rows import Row, at_most
from runtime.clock import utc_now
from runtime.settings import Settings, environment_of
from store.looks import LookBoard
from tests.support.beats import Lead, leading_beat
from tests.support.processes import WorkerProcess
from tests.support.waiting import wait_until

TARGET_S: Final = 10.0
COMMAND: Final = "`make bench-takeover`"
LONG_S: Final = 60.0
SETTLE_S: Final = 4.0  # a beat that is started again stands by after 2 to 3 s


def main() -> None:
    """Kill and empty some times, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with own_place() as place, tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        settings = place.settings
        env = environment_of(settings) | {"STOKER_WORKER__NODE": "control"}
        workers = [
            running.enter_context(WorkerProcess(name, env=env, folder=Path(folder))) for name in ("first", "second")
        ]
        emptied = running.enter_context(redis.Redis.from_url(settings.require_redis()))
        ways = {
            "kill -9 of the leading beat": lambda: os.kill(_leader(workers).pid, signal.SIGKILL),
            "FLUSHALL of Redis": emptied.flushall,
        }
        found: dict[str, list[dict[str, float]]] = {}
        for way, harm in ways.items():
            found[way] = []
            for _ in range(options.runs):
                found[way].append(measured(settings, workers, harm, after_s=SETTLE_S + 5 * moments.random()))
                print(way, json.dumps(found[way][-1]), flush=True)
        report = {"made_with": made_with("celery", "celery-redbeat"), "servers": place.versions()}
    table = [row(way, runs).as_json() for way, runs in found.items()]
    keep_run("takeover", {**report, "options": vars(options), "ways": found, "table": table}, parser, options)


def measured(
    settings: Settings, workers: Sequence[WorkerProcess], harm: Callable[[], object], *, after_s: float
) -> dict[str, float]:
    """One harm, at a moment of its own: seconds until another leads, and until schedules are looked for again."""
    wait_until(lambda: leading_beat(workers) is not None, LONG_S, "a beat leads")
    board = LookBoard(settings.require_redis())
    try:
        time.sleep(after_s)
        before = leading_beat(workers)
        began = utc_now()
        harm()
        wait_until(lambda: leading_beat(workers) not in (None, before), LONG_S, "another beat leads")
        led = _leader(workers).since
        wait_until(lambda: (board.last() or began) > led, LONG_S, "schedules are looked for")
        looked = board.last() or began
    finally:
        board.close()
    return {name: round((at - began).total_seconds(), 2) for name, at in (("leads_s", led), ("looked_s", looked))}


def row(way: str, runs: Sequence[dict[str, float]]) -> Row:
    """The worst of a way's runs is what is promised."""
    leads, looked = ([run[name] for run in runs] for name in ("leads_s", "looked_s"))
    figure = f"{way}: until another beat leads; until schedules are looked for again"
    spread = (
        f"**{statistics.median(leads):.1f} s** ({min(leads):.1f} to {max(leads):.1f}); "
        f"{statistics.median(looked):.1f} s ({min(looked):.1f} to {max(looked):.1f}; {len(runs)} runs)"
    )
    return Row(figure, spread, COMMAND, **at_most(max(looked), TARGET_S, " s"))


def _leader(workers: Sequence[WorkerProcess]) -> Lead:
    found = leading_beat(workers)
    assert found is not None
    return found


if __name__ == "__main__":
    main()
