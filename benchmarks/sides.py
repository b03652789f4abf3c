"""What the end-to-end benchmark compares, each working on one batch file a leg: the bare engine, ours, plain HTTP.

Nothing here decides who runs when; one leg runs at a time, and every engine is up before the first.
"""

from __future__ import annotations

import asyncio
import json
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import uvloop

from benchmarks.cores import processes, tree_cpu_s
from benchmarks.own_batch import RUN_S, ended, result_times, stored
from benchmarks.place import as_submitted
from benchmarks.slots import SlotSampler
from benchmarks.workloads import PATH
from inference.endpoint import Endpoint
from inference.engines import EnginePlan
from inference.replies import result_of
from models.jobs import JobResult
from models.states import Outcome
from runtime.settings import Settings
from scripts.shown_batch import seconds_of
from store.database import Database

POLL_S: Final = 0.1
BARE_SCRIPT: Final = Path(__file__).with_name("bare_engine.py")
END_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Leg:
    """One side on one file; `more` is what only some sides can tell."""

    seconds: float
    jobs: int
    prompt_tokens: int
    completion_tokens: int
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return self.completion_tokens / self.seconds


class BareEngine:
    """A vLLM that does not know of us, in a process of its own (bare_engine.py); ends when its stdin does."""

    def __init__(self, kind: str, plan: EnginePlan, *, log: Path) -> None:
        """`kind` is `chat` or `run-batch`; the flags, environment and cores are those of the plan of our server."""
        server, listens = plan.command.index("-m"), plan.command.index("--uds")
        flags = ["--model", plan.command[listens - 1], *plan.command[listens + 2 :]]
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [*plan.command[:server], str(BARE_SCRIPT), kind, *flags],
                env=dict(plan.env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._log = log
        self.not_taken: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @property
    def pid(self) -> int:
        """The root of its processes."""
        return self._child.pid

    def wait_ready(self) -> None:
        """Return when the engine is loaded."""
        self.not_taken = self._answer()["not_taken"]

    def run(self, file: Path) -> Leg:
        """One leg."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"file": str(file)}) + "\n")
        self._child.stdin.flush()
        return Leg(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], RUN_S)[0]:
            raise SystemExit(f"the bare engine has said nothing for {RUN_S:.0f} s")
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the bare engine has ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_http(url: str, file: Path, *, in_flight: int) -> Leg:
    """The file's requests straight to our engine's server, through our client, with nothing else of ours."""
    bodies = [json.dumps(json.loads(line)["body"]).encode() for line in file.read_text().splitlines()]
    return uvloop.run(_ask(url, bodies, in_flight=in_flight))


async def _ask(url: str, bodies: list[bytes], *, in_flight: int) -> Leg:
    async with Endpoint(url, api_key=None, timeout_s=3600, connections=in_flight) as endpoint:

        async def ask(number: int, body: bytes) -> JobResult:
            return result_of(number, PATH, await endpoint.post(PATH, body, request_id=f"http-{number}"))

        started = time.monotonic()
        results = await asyncio.gather(*(ask(number, body) for number, body in enumerate(bodies)))
        seconds = time.monotonic() - started
    if bad := [result for result in results if result.outcome not in (Outcome.SUCCEEDED, Outcome.TRUNCATED)]:
        raise SystemExit(f"{len(bad)} of {len(results)} requests over HTTP were not answered: {bad[0].response}")
    usages = [result.usage for result in results]
    return Leg(
        seconds, len(results), sum(usage.prompt_tokens for usage in usages), sum(u.completion_tokens for u in usages)
    )


class OurSide:
    """A batch through submit, RabbitMQ, a Celery worker and Postgres to the engine at `settings.engine.url`."""

    def __init__(self, settings: Settings, *, engine_pid: int, ours: Sequence[int]) -> None:
        """`ours`: the roots of every process that works for us, the engine's apart."""
        self._settings = settings
        self._engine_pid = engine_pid
        self._ours = ours
        self._is_fresh = True

    def starvation(self, file: Path) -> float:
        """Of a leg that is not counted: looking at vLLM's metrics costs its core what a tenth of a job does."""
        jobs = sum(1 for _ in file.open())
        url, slots = self._settings.engine.url or "", self._settings.engine.max_num_seqs
        with SlotSampler(url, slots=slots, jobs=jobs) as sampler:
            self.run(file, on_stored=sampler.begin)
        return sampler.starvation

    def run(self, file: Path, *, on_stored: Callable[[], None] = lambda: None) -> Leg:
        """From the batch's first moment in progress to its end, which is after its last durable result.

        `more`: CPU seconds outside and inside the engine from before the submit on, and the tail.
        """
        database = Database(self._settings.require_postgres())
        jobs = sum(1 for _ in file.open())
        try:
            cut = as_submitted(self._settings, is_fresh=self._is_fresh)
            before = self._cpu_s()
            batch_id = stored(database, file, cut, max_output_tokens=1024)
            on_stored()
            progress = ended(database, batch_id, poll_s=POLL_S)
            outside_s, inside_s = (now - then for now, then in zip(self._cpu_s(), before, strict=True))
            _, tail_s = result_times(database, progress.id)
        finally:
            database.close()
        if progress.succeeded + progress.truncated != jobs:
            raise SystemExit(f"{progress.done} of {jobs} jobs done, {progress.failed} failed, {progress.empty} empty")
        self._is_fresh = False
        seconds = seconds_of(progress)
        more = {
            "outside_s": outside_s,
            "inside_s": inside_s,
            "tail": tail_s / seconds,
            "cached_tokens": progress.cached_tokens,
            "shard_jobs": cut.shard.max_jobs or 0,
        }
        return Leg(seconds, jobs, progress.prompt_tokens, progress.completion_tokens, more)

    def _cpu_s(self) -> tuple[float, float]:
        """(outside, inside) the engine, so far; this process, which submits and looks on, is outside."""
        everyone = processes()
        outside_s = time.process_time() + sum(tree_cpu_s(pid, everyone) for pid in self._ours)
        return outside_s, tree_cpu_s(self._engine_pid, everyone)
