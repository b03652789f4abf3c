"""Four endpoints that are each difficult in their own way, one batch: who did how much, and how long it took.

    python -m benchmarks.endpoints [--jobs 20000] [--runs 2]

One is slow, one limits its rate (and its limit is stated half as high again as it is, so it must be learned), one fails
a fifth of its requests, one dies by `kill -9` and comes back. A real worker without an engine of its own shares the
jobs among them. `time ÷ ideal`: from the first request to the last result, by the time that these endpoints would
need if each did all it could at every moment and the last jobs ended together. 429s are counted at the endpoint, in
its first 10 seconds apart. About 4 minutes. Writes benchmarks/results/endpoints.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text

from benchmarks.own_batch import ended, stored
from benchmarks.paired import keep_run, made_with
from benchmarks.place import as_submitted, own_place
from benchmarks.refill import write_file
from benchmarks.rows import Row, at_most
from runtime.settings import Settings
from scripts.local import local_worker
from store.database import Database
from tests.support.scripted_endpoint import Calls, ScriptedEndpoint

COMMAND: Final = "`make bench-endpoints`"
POLL_S: Final = 0.25
UP_S, DOWN_S = 20.0, 10.0
LEARNED_AFTER_S: Final = 10.0
MOST_THROTTLED, MOST_TIMES = 0.01, 1.15  # targets
STATED_TOO_HIGH: Final = 1.5


@dataclass(frozen=True, slots=True)
class Kind:
    """An endpoint: how many answers a second it gives at most while it is up."""

    name: str
    latency_s: float
    slots: int
    flags: dict[str, Any] = field(default_factory=dict)
    useful: float = 1.0
    up: float = 1.0
    rate: float | None = None

    @property
    def per_s(self) -> float:
        """Good answers a second."""
        return self.up * (self.rate or self.useful * self.slots / self.latency_s)


KINDS: Final = (
    Kind("slow", latency_s=2.0, slots=64),
    Kind("limited", latency_s=0.1, slots=64, flags={"requests_per_minute": 6000}, rate=100.0),
    Kind("failing", latency_s=0.2, slots=16, flags={"fail_share": 0.2}, useful=0.8),
    Kind("dying", latency_s=0.2, slots=16, up=UP_S / (UP_S + DOWN_S)),
)


def main() -> None:
    """Run the batch some times, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    runs = []
    with own_place() as place:
        for _ in range(options.runs):
            runs.append(measured(place.settings, jobs=options.jobs))
            print(json.dumps(runs[-1]), flush=True)
        report = {"made_with": made_with("celery", "httptools"), "servers": place.versions(), "options": vars(options)}
    table = [row.as_json() for row in rows(runs, jobs=options.jobs)]
    keep_run("endpoints", {**report, "runs": runs, "table": table}, parser, options)


def rows(runs: list[dict[str, Any]], *, jobs: int) -> list[Row]:
    """The figures: of the median run by time, the shares beside."""
    times = [run["time_by_ideal"] for run in runs]
    throttled = [run["throttled_after_learning"] for run in runs]
    middle = sorted(runs, key=lambda run: run["time_by_ideal"])[len(runs) // 2]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in middle["shares"].items())
    lost = max(run["failed"] for run in runs)
    return [
        Row(
            f"{jobs:,} jobs on four endpoints (slow, rate-limited, failing 20%, dying and returning): time ÷ the ideal "
            "given their limits",
            f"**{statistics.median(times):.2f}** ({min(times):.2f} to {max(times):.2f}; {len(times)} runs)",
            COMMAND,
            headline=True,
            **at_most(statistics.median(times), MOST_TIMES),
        ),
        Row("the same: 429s ÷ requests, after the first 10 s", _share(throttled), COMMAND,
            **at_most(100 * statistics.median(throttled), 100 * MOST_THROTTLED, "%")),
        Row("the same: jobs without an answer, the most of a run", f"{lost}", COMMAND, **at_most(lost, 0)),
        Row("the same: answers by endpoint", shares, COMMAND),
    ]  # fmt: skip


def _share(found: list[float]) -> str:
    return f"**{statistics.median(found):.2%}** ({min(found):.2%} to {max(found):.2%})"


def measured(settings: Settings, *, jobs: int) -> dict[str, Any]:
    """One batch over the four."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        servers = {kind.name: _started(running, kind) for kind in KINDS}
        file = write_file(Path(folder) / "lines.jsonl", count=jobs)
        own = with_endpoints(settings, Path(folder) / "endpoints.toml", servers)
        running.enter_context(local_worker(own, name="endpoints"))
        found = _run(own, file, servers)
    ideal_s = jobs / sum(kind.per_s for kind in KINDS)
    return {"jobs": jobs, "ideal_s": round(ideal_s, 1), "time_by_ideal": round(found["seconds"] / ideal_s, 3), **found}


def _started(running: ExitStack, kind: Kind) -> ScriptedEndpoint:
    return running.enter_context(ScriptedEndpoint(latency_s=kind.latency_s, slots=kind.slots, **kind.flags))


def with_endpoints(settings: Settings, file: Path, servers: dict[str, ScriptedEndpoint]) -> Settings:
    """A worker without an engine, and these endpoints; the limit is stated too high, the rest must be found out."""
    tables = []
    for kind in KINDS:
        stated = round((kind.rate or 0) * 60 * STATED_TOO_HIGH)
        limit = f"requests_per_minute = {stated}\n" if stated else ""
        tables.append(
            f'[[endpoint]]\nname = "{kind.name}"\nurl = "{servers[kind.name].url}"\ntrust = "own"\n{limit}'
            f'models = {{ scripted = "scripted" }}\n'
        )
    file.write_text("\n".join(tables))
    return settings.model_copy(
        update={
            "engine": settings.engine.model_copy(update={"kind": "none", "url": None}),
            "endpoints": settings.endpoints.model_copy(update={"file": file}),
        }
    )


def _run(settings: Settings, file: Path, servers: dict[str, ScriptedEndpoint]) -> dict[str, Any]:
    database = Database(settings.require_postgres())
    try:
        with dying(servers["dying"]) as deaths:
            batch_id = stored(database, file, as_submitted(settings, is_fresh=True))
            time.sleep(LEARNED_AFTER_S)
            early = servers["limited"].calls()
            progress = ended(database, batch_id, poll_s=POLL_S)
            ended_at = time.monotonic()
        late = servers["limited"].calls()
        with database.transaction() as session:
            answered = session.execute(
                text("""
                SELECT e.description ->> 'name', count(*) FROM results r JOIN engines e ON e.id = r.engine_id
                WHERE r.batch_id = :batch AND r.outcome <> 'failed' GROUP BY 1 ORDER BY 2 DESC"""),
                {"batch": batch_id},
            ).all()
    finally:
        database.close()
    return {
        "seconds": round(ended_at - early.first_at, 1),
        "failed": progress.failed,
        "shares": {name: round(count / progress.total, 4) for name, count in answered},
        "throttled": round(_throttled(late) / max(1, late.count), 4),
        "throttled_after_learning": round((_throttled(late) - _throttled(early)) / max(1, late.count - early.count), 4),
        "deaths": len(deaths),
    }


def _throttled(calls: Calls) -> int:
    return calls.statuses.get("429", 0)


@contextmanager
def dying(server: ScriptedEndpoint) -> Iterator[list[float]]:
    """For this block it is killed and started again, again and again; when it was."""
    over, deaths = threading.Event(), []

    def kill_and_start() -> None:
        while not over.wait(UP_S):
            server.kill()
            deaths.append(time.monotonic())
            over.wait(DOWN_S)
            server.start()

    thread = threading.Thread(target=kill_and_start, daemon=True)
    thread.start()
    try:
        yield deaths
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
