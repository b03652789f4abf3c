"""How full engines are kept: the share of their slots that stand empty while the batch still has jobs to send.

    python -m benchmarks.refill [--jobs 15000] [--runs 5]

Scripted engines whose service times are lognormal, a real worker for each, services of its own. An engine itself adds
up how long its slots are taken. What counts is the time from the first request at any engine to the last one's arrival
at any, the ramp at the start included; an engine that had its last request earlier counts as empty from then on. The
tail is the share of the time, from the first result to the last, in which the last 5% of the jobs end; beside it what
it would be if every slot got its next job at once, simulated: some jobs take long. The last case has two small engines:
their workers' shards must not keep one of them busy alone. About 15 minutes. Writes benchmarks/results/refill.json.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.own_batch import before_tail, ended, result_times, stored
from benchmarks.paired import PAIRS, keep_run, made_with
from benchmarks.place import as_submitted, own_place
from benchmarks.rows import STARVATION, Row, at_most, spread_of
from runtime.settings import Settings
from scripts.local import local_worker
from store.database import Database
from tests.support.scripted_answers import drawn_latency_s
from tests.support.scripted_endpoint import ScriptedEndpoint

POLL_S: Final = 0.25
COMMAND: Final = "`make bench-refill`"
TAIL: Final = 0.1  # target


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


def main() -> None:
    """Measure each case some times, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=15_000, help="of the large engine")
    parser.add_argument("--sigma", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=PAIRS)
    options = parser.parse_args()
    large = Case(engines=1, slots=2048, children=4, jobs=options.jobs, median_s=4.0)
    cases = [large, replace(large, places_a_slot=2), Case(2, 64, 2, jobs=8_000, median_s=1.0, places_a_slot=2)]
    found: list[dict[str, Any]] = []
    with own_place() as place:
        for case in cases:
            runs = []
            for _ in range(options.runs):
                runs.append(measured(place.settings, case, sigma=options.sigma))
                print(json.dumps(asdict(case) | runs[-1]), flush=True)
            at_best = ideal_tail(case, sigma=options.sigma)
            found.append({"case": asdict(case) | {"in_flight": case.in_flight}, "runs": runs, "ideal_tail": at_best})
        report = {"made_with": made_with("celery", "httptools"), "servers": place.versions(), "options": vars(options)}
    table = [row.as_json() for each in found for row in rows(each, is_first=each is found[0])]
    keep_run("refill", {**report, "cases": found, "table": table}, parser, options)


def rows(found: dict[str, Any], *, is_first: bool) -> list[Row]:
    """A case's two figures: the medians, the least and the most of its runs."""
    case = found["case"]
    engines = f"{case['engines']} × {case['slots']:,} slots, {case['in_flight']:,} in flight each"
    starvation, tail = ([run[name] for run in found["runs"]] for name in ("starvation", "tail"))
    judged = at_most(100 * statistics.median(starvation), 100 * STARVATION, "%")
    least = found["ideal_tail"]
    figure = (
        f"slots empty while the batch has jobs to send: {engines}, {case['jobs']:,} jobs of lognormal service times"
    )
    tail_figure = "the same: time of the last 5% of the jobs; simulated, if every slot got its next job at once"
    jobs_a_slot = case["jobs"] / (case["engines"] * case["slots"])
    can_be_met: dict[str, Any] = (
        {"target": f"≤ {TAIL:.0%}, out of reach with {jobs_a_slot:.0f} jobs a slot"}
        if least > TAIL
        else at_most(100 * statistics.median(tail), 100 * TAIL, "%")
    )
    return [
        Row(figure, spread_of(starvation), COMMAND, headline=is_first, **judged),
        Row(tail_figure, f"{spread_of(tail)}; {least:.1%}", COMMAND, **can_be_met),
    ]


def ideal_tail(case: Case, *, sigma: float) -> float:
    """The tail of the same jobs, in their order, where no slot ever waits."""
    free_at = [0.0] * (case.engines * case.slots)
    ends = []
    for number in range(case.jobs):
        ends.append(free_at[0] + drawn_latency_s(prompt(number), median_s=case.median_s, sigma=sigma))
        heapq.heapreplace(free_at, ends[-1])
    ends.sort()
    return (ends[-1] - before_tail(ends)) / (ends[-1] - ends[0])


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
        tail = run(settings, file)
        calls = [engine.calls() for engine in engines]
    seconds = max(call.last_at for call in calls) - min(call.first_at for call in calls)
    taken_s = sum(call.slot_seconds for call in calls)
    return {
        "most_running": max(call.most_running for call in calls),
        "seconds_until_the_last_arrival": round(seconds, 1),
        "starvation": round(1 - taken_s / (case.engines * case.slots * seconds), 4),
        "tail": round(tail, 4),
    }


def served_by(settings: Settings, case: Case, url: str) -> Settings:
    """Settings of the worker of one engine."""
    worker = settings.worker.model_copy(
        update={"children": case.children, "in_flight": case.in_flight // case.children}
    )
    engine = settings.engine.model_copy(update={"url": url, "max_num_seqs": case.slots})
    return settings.model_copy(update={"worker": worker, "engine": engine})


def prompt(number: int) -> str:
    """Of one job; the engine draws its service time from it, so every run has the same."""
    return f"question {number}"


def write_file(path: Path, *, count: int) -> Path:
    """As many chats, all different."""
    with path.open("w") as opened:
        for number in range(count):
            body = {"model": "scripted", "messages": [{"role": "user", "content": prompt(number)}]}
            line = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def run(settings: Settings, file: Path) -> float:
    """Submit and wait: the share of the time in which the last 5% ended."""
    database = Database(settings.require_postgres())
    try:
        batch_id = stored(database, file, as_submitted(settings, is_fresh=True))
        ended(database, batch_id, poll_s=POLL_S)
        span_s, tail_s = result_times(database, batch_id)
    finally:
        database.close()
    return tail_s / span_s


if __name__ == "__main__":
    main()
