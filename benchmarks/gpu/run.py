"""The figures that only a GPU can give, within some minutes and without a model hub, a server or an account.

    python -m benchmarks.gpu.run --out DIR [--minutes 8] [--checkpoint FOLDER] [--tiny]

Three questions, on models of well-known sizes with made-up weights (dummy.py), or on `--checkpoint` for the first two:

  end to end   our server, and our whole system where it can run, beside offline `LLM.chat` with the same flags
  precision    16 bit, FP8, 4 bit: memory of the weights, room for the KV cache, tokens a second
  front ends   `--api-server-count` 1, 2 and 4 before a 0.5B model, 8 tokens a job

A row is started only if it is likely to end in time; what was not measured is listed with the reason. DIR/gpu.json and
DIR/gpu.md are written after every row. `--tiny` exercises the same paths on a CPU: its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.dummy import SHAPES, write_dummy
from benchmarks.paired import Ratio, by_turns, made_with
from benchmarks.sides import BareEngine, Leg, OurSide, run_http
from benchmarks.workloads import Workload, write_workload
from inference.endpoint import Endpoint
from inference.engines import EnginePlan, has_gpu, plan_engine
from inference.supervisor import EngineSupervisor
from runtime.errors import StokerError
from runtime.settings import EngineSettings, Settings, load_settings
from scripts.local import local_services, local_worker, prepare_schema

TOKENIZER: Final = Path(".checkpoints/smollm2-135m-bf16")
PRECISIONS: Final = {"16 bit": "", "FP8": "--quantization fp8", "4 bit": ""}
OUTPUTS: Final = (128, 256, 64, 8)
FRONT_ENDS: Final = (1, 2, 4)
_CACHE: Final = re.compile(r'^vllm:cache_config_info\{.*?block_size="(\d+)".*?num_gpu_blocks="(\d+)"', re.MULTILINE)
_WEIGHTS: Final = re.compile(r"(?:Model loading took|Loading model weights took) ([0-9.]+) Gi?B")


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is up: `settings` without its address, and the pid at its root."""

    plan: EnginePlan
    settings: EngineSettings
    log: Path
    pid: int


@dataclass(slots=True)
class Run:
    """What was asked for, what has been measured, and the time that is left."""

    options: argparse.Namespace
    folder: Path
    began: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    slowest_s: dict[str, float] = field(default_factory=dict)  # by kind, which is the name up to its colon
    leg: int = 0

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one, unless there is no time for one as slow as the slowest of its kind; write what there is."""
        began, kind = time.monotonic(), name.partition(":")[0]
        left = 60 * self.options.minutes - (began - self.began)
        slowest_s = self.slowest_s.get(kind, min(self.slowest_s.values(), default=0.0))  # of a new kind: the quickest
        if left <= slowest_s:
            reason = f"{left:.0f} s were left, such a row takes {slowest_s:.0f}"
            self.not_measured.append({"row": name, "reason": reason})
        else:
            try:
                self.rows.append({"row": name} | measure())
            except (Exception, SystemExit) as error:  # whatever it is, the machine is lent for minutes: on to the next
                self.not_measured.append({"row": name, "reason": f"{type(error).__name__}: {error}"[-600:]})
            self.slowest_s[kind] = max(slowest_s, time.monotonic() - began)
        self.write()

    def write(self) -> None:
        """Both files."""
        report = {
            "made_with": made_with() | {"gpu": _gpu(), "tiny": self.options.tiny},
            "rows": self.rows,
            "not_measured": self.not_measured,
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "gpu.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        lines = [f"- **{row['row']}**: {row['said']}" for row in self.rows]
        lines += [f"- {gap['row']}: not measured: {gap['reason'].splitlines()[-1]}" for gap in self.not_measured]
        head = f"# On {_gpu()}{', tiny: says nothing of a GPU' if self.options.tiny else ''}\n\n"
        (self.options.out / "gpu.md").write_text(head + "\n".join(lines) + "\n")

    def file(self, *, jobs: int, tokens: int, model: str) -> Path:
        """A batch file that no engine has seen."""
        self.leg += 1
        workload = Workload("gpu", jobs=jobs, output_tokens=(tokens,))
        return write_workload(self.folder / f"{self.leg}.jsonl", workload, model=model, leg=self.leg)


def main() -> None:
    """Measure in the order of what matters most."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="stoker-gpu-") as name:
        run = Run(options, Path(name))
        run.folder.chmod(0o755)  # the embedded servers run as an account of their own, where we are root
        large, small = ("tiny", "tiny") if options.tiny else ("7b", "0.5b")
        checkpoint = options.checkpoint or write_dummy(run.folder / large, SHAPES[large], tokenizer=options.tokenizer)
        fp8 = "" if options.checkpoint or options.tiny else PRECISIONS["FP8"]
        run.row("end to end", partial(_end_to_end, run, checkpoint, args=fp8))
        for precision, args in PRECISIONS.items():
            run.row(f"precision: {precision}", partial(_precision, run, large, precision, args=args))
        folder = write_dummy(run.folder / "small", SHAPES[small], tokenizer=options.tokenizer)
        for count in FRONT_ENDS:
            run.row(f"front ends: {count}", partial(_front_ends, run, folder, count=count))
    print((options.out / "gpu.md").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--checkpoint", type=Path, help="a real one for `end to end`, instead of a 7B without weights")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a checkpoint whose tokenizer is used")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and a few jobs, on any machine")
    options = parser.parse_args()
    if not options.tiny and not has_gpu():
        parser.error("nvidia-smi lists no GPU; --tiny exercises the script without one")
    return options


@contextmanager
def _served(run: Run, checkpoint: Path, *, args: str, api_servers: int = 1, beside: bool = False) -> Iterator[Served]:
    """A server up and warm; `beside` another engine on the same GPU."""
    tiny = run.options.tiny
    memory = "" if tiny else f"--gpu-memory-utilization {0.45 if beside else 0.9}"
    made_up = "" if checkpoint == run.options.checkpoint else "--load-format dummy"
    settings = load_settings().engine.model_copy(
        update={
            "url": None,
            "kind": "vllm",
            "checkpoint": checkpoint,
            "alias": "gpu",
            "args": " ".join((args, memory, made_up)),
            "max_num_seqs": 8 if tiny else 256,
            "max_num_batched_tokens": 2048 if tiny else 8192,
            "api_servers": api_servers,
        }
    )
    socket = run.folder / f"{checkpoint.name}-{api_servers}.sock"
    log = run.folder / f"{socket.stem}.log"
    plan = plan_engine(settings, socket=socket)
    assert plan is not None
    with EngineSupervisor(plan, log_file=log, start_timeout_s=60 * run.options.minutes, stall_s=120) as server:
        assert server.pid is not None
        run_http(plan.url, run.file(jobs=plan.slots, tokens=8, model=plan.alias), in_flight=2 * plan.slots)
        yield Served(plan, settings, log, server.pid)


def _end_to_end(run: Run, checkpoint: Path, *, args: str) -> dict[str, Any]:
    """Ours and plain HTTP beside `LLM.chat`, at several lengths of output, until the time is over."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        served = stack.enter_context(_served(run, checkpoint, args=args, beside=True))
        plan = served.plan
        bare = stack.enter_context(BareEngine("chat", plan, log=run.folder / "chat.log"))
        bare.wait_ready()
        sides: dict[str, Callable[[Path], Leg]] = {
            "chat": bare.run,
            "http": lambda file: run_http(plan.url, file, in_flight=2 * plan.slots),
        }
        try:
            sides["ours"] = stack.enter_context(_ours(run, served)).run
        except (StokerError, ImportError) as error:
            run.not_measured.append({"row": "end to end, ours", "reason": str(error)})
        for tokens in (8, 4) if run.options.tiny else OUTPUTS:
            if time.monotonic() - run.began > 30 * run.options.minutes:  # half of it is for the other rows
                run.not_measured.append({"row": f"end to end, {tokens} tokens", "reason": "half of the time was over"})
                continue
            found[f"{tokens} tokens"] = _by_turns(run, plan, sides, tokens=tokens)
    said = "; ".join(
        f"{length}: " + ", ".join(f"{side} ÷ LLM.chat **{ratio['median']:.2f}**" for side, ratio in ratios.items())
        for length, ratios in found.items()
    )
    return {"checkpoint": checkpoint.name, "ratios": found, "said": said}


def _by_turns(
    run: Run, plan: EnginePlan, sides: dict[str, Callable[[Path], Leg]], *, tokens: int
) -> dict[str, dict[str, Any]]:
    """Each other side's tokens a second ÷ those of the bare engine."""
    jobs = plan.slots * (2 if tokens > 64 or run.options.tiny else 4)

    def turn(side: Callable[[Path], Leg]) -> Callable[[], float]:
        return lambda: side(run.file(jobs=jobs, tokens=tokens, model=plan.alias)).tokens_per_s

    turns = {name: turn(side) for name, side in sides.items()}
    by_turns(turns, pairs=1)  # not counted: nobody is cold
    speeds = by_turns(turns, pairs=run.options.pairs)
    return {name: asdict(Ratio.of(speeds[name], speeds["chat"])) for name in sides if name != "chat"}


@contextmanager
def _ours(run: Run, engine: Served) -> Iterator[OurSide]:
    """Our system with embedded services before this server."""
    home = run.folder / "home"
    home.mkdir()
    settings: Settings = load_settings().model_copy(update={"home": home})
    with local_services(settings) as services:
        prepare_schema(services)
        served = services.model_copy(update={"engine": engine.settings.model_copy(update={"url": engine.plan.url})})
        with local_worker(served) as worker:
            yield OurSide(served, engine_pid=engine.pid, ours=[worker.process.pid])


def _precision(run: Run, shape: str, precision: str, *, args: str) -> dict[str, Any]:
    """Memory and speed of one precision, full."""
    name = f"{shape}-{precision.replace(' ', '')}"
    four_bit = precision == "4 bit"
    folder = write_dummy(run.folder / name, SHAPES[shape], tokenizer=run.options.tokenizer, four_bit=four_bit)
    with _served(run, folder, args=args) as served:
        plan, log = served.plan, served.log
        legs = [
            run_http(
                plan.url, run.file(jobs=2 * plan.slots, tokens=128, model=plan.alias), in_flight=2 * plan.slots
            ).tokens_per_s
            for _ in range(run.options.pairs)
        ]
        room, weights = _kv_room(plan), _WEIGHTS.search(log.read_text(errors="replace"))
        row = {
            "weights_gib": float(weights[1]) if weights else None,
            "kv_room_tokens": room,
            "gpu_memory_mib": _gpu_memory_mib(),
            "tokens_per_s": legs,
        }
    said = f"weights {row['weights_gib']} GiB, KV room {room} tokens, {statistics.median(legs):,.0f} tokens/s"
    return row | {"said": said}


def _front_ends(run: Run, folder: Path, *, count: int) -> dict[str, Any]:
    """Jobs a second of 8 tokens each."""
    with _served(run, folder, args="", api_servers=count) as served:
        plan = served.plan
        jobs = (4 if run.options.tiny else 16) * plan.slots
        legs = []
        for _ in range(run.options.pairs):
            leg = run_http(plan.url, run.file(jobs=jobs, tokens=8, model=plan.alias), in_flight=2 * plan.slots)
            legs.append(leg.jobs / leg.seconds)
    return {"jobs_per_s": legs, "said": f"{statistics.median(legs):,.0f} jobs/s"}


def _kv_room(plan: EnginePlan) -> int | None:
    """Tokens that the engine's KV cache holds, as its metrics say."""

    async def ask() -> str:
        async with Endpoint(plan.url, api_key=None, timeout_s=10, connections=1) as endpoint:
            return await endpoint.text("/metrics")

    found = _CACHE.search(asyncio.run(ask()))
    return int(found[1]) * int(found[2]) if found else None


def _gpu() -> str:
    return _nvidia_smi("name,driver_version") or "no GPU"


def _gpu_memory_mib() -> str | None:
    return _nvidia_smi("memory.used") or None


def _nvidia_smi(what: str) -> str:
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return said.stdout.strip()


if __name__ == "__main__":
    main()
