"""The whole system beside the bare engine: six workloads, by turns, in one run.

    python -m benchmarks.end_to_end [--pairs 5] [--only "64 tokens"] [--cores pinned|all|both] [--leg-s 12]

Sides: `chat`, offline `LLM.chat`; `run-batch`, vLLM's own batch runner; `http`, our client straight to our engine's
server; `ours`, submit, RabbitMQ, a Celery worker and Postgres before that server. All three engines are one version
with the same flags, loaded and warm before the first leg (bare_engine.py says what that favours).

Pinned, the main figure: each engine, its front end included, has the first core and everything else of ours, RabbitMQ
and Postgres too, the second; only one engine has work at a time. With all cores nothing is pinned. `run-batch` and
`http` take part where SIDES says so. How many jobs a workload has comes from a leg that is not counted, so that a leg
takes about `--leg-s`; never fewer than FILLS times the engine's slots, so 256 tokens take what they take. Lengths
are fixed and must agree between the sides to the token; answers in JSON end by themselves, so tokens a second are
compared. Between legs it waits until the engine that had work no longer spins. The cache is off. About 35 minutes.
Writes benchmarks/results/end_to_end.json; while it runs, and with options of its own, end_to_end.partial.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.cores import kept_on
from benchmarks.end_to_end_report import note_of, rows_of
from benchmarks.paired import PAIRS, Ratio, by_turns, keep, keep_run, made_with
from benchmarks.place import Place, own_place
from benchmarks.sides import BareEngine, Leg, OurSide, run_http
from benchmarks.slots import FLAG
from benchmarks.workloads import WORKLOADS, Workload, write_workload
from inference.engines import EnginePlan, plan_engine
from inference.supervisor import EngineSupervisor
from runtime.settings import EngineSettings, Settings, load_settings
from scripts.checkpoint_speed import SETTLED_S
from scripts.local import local_worker

OURS: Final = "ours"
SIDES: Final = ("chat", "run-batch", "http", OURS)
ALL_SIDES_IN: Final = ("64 tokens",)  # elsewhere `chat` and ours, for the time that it takes
ALL_CORES_IN: Final = ("64 tokens",)  # with --cores both and without --only
SAMPLED: Final = 3  # legs more, to look at the slots
FILLS: Final = 3  # slots are filled so often, at least: once tells nothing of how they are filled again


@dataclass(slots=True)
class Room:
    """The engines and our system, up; and the number of the next leg's file."""

    folder: Path
    plan: EnginePlan
    runs: Mapping[str, Callable[[Path], Leg]]
    starvation: Callable[[Path], float]
    slots: int
    leg: int = 0

    def run(self, side: str, workload: Workload) -> Leg:
        """One leg on a file that no engine has seen."""
        with self.file(workload) as file:
            return self.runs[side](file)

    @contextmanager
    def file(self, workload: Workload) -> Iterator[Path]:
        """A new leg's, once the engine of the last one has settled."""
        self.leg += 1
        time.sleep(SETTLED_S)
        file = write_workload(self.folder / f"{self.leg}.jsonl", workload, model=self.plan.alias, leg=self.leg)
        try:
            yield file
        finally:
            file.unlink()


def main() -> None:
    """Measure, print a line a workload, write the report."""
    parser = _parser()
    options = parser.parse_args()
    names = [w.name for w in WORKLOADS if options.only in (None, w.name) and w.name not in options.skip]
    if not names:
        raise SystemExit(f"no workload {options.only!r}; there are {', '.join(w.name for w in WORKLOADS)}")
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"made_with": made_with("celery", "httptools"), "options": vars(options)}
    jobs: dict[str, int] = {}  # with all cores as many as pinned
    for cores in ("pinned", "all") if options.cores == "both" else (options.cores,):
        with _room(cores, options) as (room, said):
            report.setdefault("engine", dict(room.plan.description) | said.pop("engine"))
            report[f"cores_{cores}"] = said
            for workload in WORKLOADS:
                skipped = cores == "all" and options.cores == "both" and workload.name not in ALL_CORES_IN
                if workload.name in names and (options.only or not skipped):
                    rows.append({"cores": cores} | _measured(room, workload, jobs, options))
                    print(_line(rows[-1]), flush=True)
                    keep("end_to_end", report | {"rows": rows}, is_whole=False)
    report |= {"rows": rows, "note": note_of(report)}
    keep_run("end_to_end", report | {"table": [row.as_json() for row in rows_of(report)]}, parser, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--only", metavar="WORKLOAD")
    parser.add_argument("--skip", metavar="WORKLOAD", action="append", default=[])
    parser.add_argument("--cores", choices=["pinned", "all", "both"], default="both")
    parser.add_argument("--leg-s", type=float, default=12)
    parser.add_argument("--slots", type=int, default=8, help="the engine's --max-num-seqs")
    return parser


@contextmanager
def _room(cores: str, options: argparse.Namespace) -> Iterator[tuple[Room, dict[str, Any]]]:
    """Everything up, warm, and on its cores; and what is to be said of that."""
    engines = ours = sorted(os.sched_getaffinity(0))
    if cores == "pinned":
        if len(ours) < 2:
            raise SystemExit("pinning needs two cores: run with --cores all")
        engines, ours = ours[:1], ours[1:2]
    asked = load_settings().engine
    planned = asked.model_copy(update={"max_num_seqs": options.slots, "url": None, "args": f"{asked.args} {FLAG}"})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="stoker-bench-")))
        plan = planned_on(planned, folder / "engine.sock", engines)
        this = stack.enter_context(kept_on(set(ours), {}))  # and what it starts: the worker, the servers
        place = stack.enter_context(own_place())
        room, said = _started(stack, place, plan, planned=planned, folder=folder)
        said |= {
            "servers": place.versions(),
            "engine_cores": engines,
            "cores_of_all_else": ours,
            "all_else": [*this, "worker", *place.servers],
        }
        for side in room.runs:
            room.run(side, replace(WORKLOADS[0], jobs=options.slots))
        yield room, said


def planned_on(planned: EngineSettings, socket: Path, cores: list[int]) -> EnginePlan:
    """The engine's plan, with all of its processes and its OpenMP threads on these cores."""
    plan = plan_engine(planned, socket=socket)
    if plan is None or plan.kind != "vllm":
        raise SystemExit("this benchmark compares with vLLM: `make engine-vllm checkpoint`, and set no other engine")
    listed = ",".join(map(str, cores))
    env = {**plan.env, "VLLM_CPU_OMP_THREADS_BIND": listed}
    return replace(plan, command=("taskset", "-c", listed, *plan.command), env=env)


def _started(
    stack: ExitStack, place: Place, plan: EnginePlan, *, planned: EngineSettings, folder: Path
) -> tuple[Room, dict[str, Any]]:
    """The three engines, loading side by side, and a worker before the server."""
    bare = {
        kind: stack.enter_context(BareEngine(kind, plan, log=folder / f"{kind}.log")) for kind in ("chat", "run-batch")
    }
    server = EngineSupervisor(
        plan, log_file=folder / "engine.log", start_timeout_s=planned.start_timeout_s, stall_s=planned.stall_s
    )
    stack.enter_context(server)
    for engine in bare.values():
        engine.wait_ready()
    settings = _served(place.settings, plan.url, planned)
    worker = stack.enter_context(local_worker(settings))
    assert server.pid is not None
    ours = OurSide(settings, engine_pid=server.pid, ours=[worker.process.pid, *place.servers.values()])
    runs = {
        "chat": bare["chat"].run,
        "run-batch": bare["run-batch"].run,
        "http": lambda file: run_http(plan.url, file, in_flight=2 * plan.slots),
        OURS: ours.run,
    }
    said = {kind: engine.not_taken for kind, engine in bare.items()}
    return Room(folder, plan, runs, ours.starvation, plan.slots), {
        "engine": {"version": server.version},
        "flags_not_taken": said,
    }


def _served(settings: Settings, url: str, planned: EngineSettings) -> Settings:
    return settings.model_copy(update={"engine": planned.model_copy(update={"url": url})})


def _measured(room: Room, workload: Workload, jobs: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """One row: every side's legs, the ratios of ours to each other one, and what our side's legs tell besides."""
    if workload.name not in jobs:
        jobs[workload.name] = _sized(room, workload, leg_s=options.leg_s)
    workload = replace(workload, jobs=jobs[workload.name])
    sides = SIDES if workload.name in ALL_SIDES_IN else ("chat", OURS)
    legs: dict[str, list[Leg]] = {side: [] for side in sides}

    def turn(side: str) -> Callable[[], float]:
        def run() -> float:
            legs[side].append(room.run(side, workload))
            return legs[side][-1].tokens_per_s

        return run

    rates = by_turns({side: turn(side) for side in sides}, pairs=options.pairs)
    _expect_alike(workload, legs)
    starvation = []
    for _ in range(SAMPLED):
        with room.file(workload) as file:
            starvation.append(round(room.starvation(file), 4))
    return {
        "workload": asdict(workload),
        "tokens_per_s": rates,
        "ratio": {side: asdict(Ratio.of(rates[OURS], rates[side])) for side in sides if side != OURS},
        "ours": {"starvation": starvation} | _of_ours(legs[OURS]),
        "legs": {side: [asdict(leg) for leg in ended] for side, ended in legs.items()},
    }


def _sized(room: Room, workload: Workload, *, leg_s: float) -> int:
    """How many jobs take about `leg_s`, from the second of two short legs of the bare engine."""
    some = replace(workload, jobs=2 * room.slots)
    for side in (OURS, "chat"):  # each engine compiles a grammar once
        room.run(side, some)
    leg = room.run("chat", some)
    return max(FILLS * room.slots, round(leg.jobs * leg_s / leg.seconds))


def _expect_alike(workload: Workload, legs: Mapping[str, list[Leg]]) -> None:
    """SystemExit if two sides did not read the same, or, where lengths are fixed, did not write as much."""
    read = {leg.prompt_tokens for ended in legs.values() for leg in ended}
    written = {leg.completion_tokens for ended in legs.values() for leg in ended}
    lengths = workload.output_tokens
    wanted = sum(lengths[seq % len(lengths)] for seq in range(workload.jobs))
    if len(read) > 1 or (not workload.schema and written != {wanted}):
        raise SystemExit(f"{workload.name}: the sides read {sorted(read)} and wrote {sorted(written)}, not {wanted}")


def _of_ours(legs: list[Leg]) -> dict[str, Any]:
    """Medians of our legs."""

    def median(of: Callable[[Leg], float]) -> float:
        return round(statistics.median(of(leg) for leg in legs), 4)

    return {
        "last_twentieth_of_the_time": median(lambda leg: leg.more["tail"]),
        "outside_us_a_job": median(lambda leg: leg.more["outside_s"] / leg.jobs * 1e6),
        "outside_by_inside": median(lambda leg: leg.more["outside_s"] / leg.more["inside_s"]),
    }


def _line(row: Mapping[str, Any]) -> str:
    ratios = ", ".join(
        f"÷ {side} {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
        for side, ratio in row["ratio"].items()
    )
    rate = statistics.median(row["tokens_per_s"][OURS])
    return (
        f"{row['cores']:6} {row['workload']['name']:15} {row['workload']['jobs']:5} jobs {rate:7.1f} tokens/s: "
        f"{ratios}; "
        f"starvation {statistics.median(row['ours']['starvation']):.1%}, "
        f"outside {row['ours']['outside_us_a_job']:.0f} µs a job, "
        f"{row['ours']['outside_by_inside']:.3f} of inside"
    )


if __name__ == "__main__":
    main()
