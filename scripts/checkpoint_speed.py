"""Tokens/s of two checkpoints, each served by an engine of its own. It must not know of schemes or cards.

Every leg sends the same requests, all with a fixed output length, twice max_num_seqs in flight, as a worker has.
They are completions, not chats: a base model has no chat template. The first leg of an engine is not counted; it says
how many requests the others have. Between legs the engine that had work settles.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inference.endpoint import Endpoint
from inference.engines import EnginePlan, has_gpu, plan_engine
from inference.supervisor import EngineSupervisor
from runtime.errors import Fatal
from runtime.settings import EngineSettings
from scripts.checkpoint_card import size_of

PAIRS = 5
FILLS, MOST_FILLS = 2, 64  # requests a leg, in fills of the engine: the first, and at most
LEG_S = 10.0
LONGEST_LEG_S = 300.0  # vLLM computes float8 on a CPU without instructions for it at less than a token a second
SETTLED_S = 2.0  # vLLM's processes look for work without a pause for 1 s after they had some
OUTPUT_TOKENS = 32
IN_FLIGHT_A_SLOT = 2
PROMPT = (
    "wrote to the shop about a parcel that was due on Friday and had not come. The clerk looked the order up, found "
    "that it was still in the depot of the carrier, and answered as follows:"
)
GIB = 1024**3
PROCESS_BYTES = 2 * GIB  # vLLM on a CPU beside weights and KV cache: chosen, with room to spare

Show = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s of every counted leg, pair by pair."""

    before: list[float]
    after: list[float]
    engine: str
    max_num_seqs: int
    requests: int
    is_by_turns: bool

    @property
    def ratios(self) -> list[float]:
        """After ÷ before of each pair."""
        return [after / before for before, after in zip(self.before, self.after, strict=True)]

    def as_card(self) -> dict[str, object]:
        """The medians, the ratio with its least and most, and how it was measured."""
        order = "legs by turns, both engines up" if self.is_by_turns else "one engine after the other"
        return {
            "before": round(statistics.median(self.before), 1),
            "after": round(statistics.median(self.after), 1),
            "ratio": round(statistics.median(self.ratios), 3),
            "ratio_least": round(min(self.ratios), 3),
            "ratio_most": round(max(self.ratios), 3),
            "engine": self.engine,
            "how": f"{len(self.before)} legs each, {order}; {self.requests} completions a leg, the same "
            f"short prompts each time, {OUTPUT_TOKENS} tokens each, {IN_FLIGHT_A_SLOT * self.max_num_seqs} in flight",
        }


def compare_speed(before: Path, after: Path, *, engine: EngineSettings, show: Show) -> Speed:
    """Measure both checkpoints with these settings but for the checkpoint; `show` gets the share that is done.

    Raises BadInput where no engine can be planned here for either, Fatal if one does not start or answers wrongly,
    Transient if one dies.
    """
    with tempfile.TemporaryDirectory(prefix="stoker-speed-") as temporary:
        folder = Path(temporary)
        plans = [
            _plan(checkpoint, engine, socket=folder / f"{at}.sock") for at, checkpoint in enumerate((before, after))
        ]
        done = _counter(show, legs=2 * (PAIRS + 1))
        is_by_turns = _fit_together((before, after), plans)
        measure = _by_turns if is_by_turns else _one_after_the_other
        rates, requests, version = measure(plans, engine=engine, done=done)
    return Speed(
        before=rates[0],
        after=rates[1],
        engine=f"{plans[1].kind} {version}",
        max_num_seqs=plans[1].slots,
        requests=requests,
        is_by_turns=is_by_turns,
    )


def _plan(checkpoint: Path, settings: EngineSettings, *, socket: Path) -> EnginePlan:
    ours = settings.model_copy(update={"checkpoint": checkpoint, "kind": "vllm", "url": None})
    plan = plan_engine(ours, socket=socket)
    if plan is None:
        raise Fatal(f"no engine was planned for {checkpoint}")
    return plan


def _fit_together(checkpoints: Sequence[Path], plans: Sequence[EnginePlan]) -> bool:
    """Whether two engines may be up at once: never on a GPU, which one fills; on a CPU in half of the memory."""
    if has_gpu():
        return False
    kv_bytes = sum(int(plan.env.get("VLLM_CPU_KVCACHE_SPACE", "2")) * GIB for plan in plans)
    needed = kv_bytes + sum(size_of(checkpoint) + PROCESS_BYTES for checkpoint in checkpoints)
    return needed < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def _by_turns(
    plans: Sequence[EnginePlan], *, engine: EngineSettings, done: Callable[[], None]
) -> tuple[list[list[float]], int, str | None]:
    """A B, B A, A B, …: what drifts on the machine, drifts for both."""
    rates: list[list[float]] = [[] for _ in plans]
    with _engine(plans[0], engine), _engine(plans[1], engine) as second:
        requests = min(_sized(plan, done) for plan in plans)
        for pair in range(PAIRS):
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                rates[side].append(_counted(plans[side], requests, done))
    return rates, requests, second.version


def _one_after_the_other(
    plans: Sequence[EnginePlan], *, engine: EngineSettings, done: Callable[[], None]
) -> tuple[list[list[float]], int, str | None]:
    rates: list[list[float]] = []
    requests = 0
    for plan in plans:
        with _engine(plan, engine) as running:
            warmed = _sized(plan, done)
            requests = requests or warmed
            rates.append([_counted(plan, requests, done) for _ in range(PAIRS)])
    return rates, requests, running.version


def _sized(plan: EnginePlan, done: Callable[[], None]) -> int:
    """A leg that is not counted: how many requests take about LEG_S."""
    rate = _counted(plan, FILLS * plan.slots, done)
    return max(FILLS * plan.slots, min(MOST_FILLS * plan.slots, round(rate * LEG_S / OUTPUT_TOKENS)))


def _counted(plan: EnginePlan, requests: int, done: Callable[[], None]) -> float:
    time.sleep(SETTLED_S)
    rate = asyncio.run(_leg(plan, requests))
    done()
    return rate


def _engine(plan: EnginePlan, settings: EngineSettings) -> EngineSupervisor:
    log = Path(plan.url.removeprefix("unix://")).with_suffix(".log")
    return EngineSupervisor(plan, log_file=log, start_timeout_s=settings.start_timeout_s, stall_s=settings.stall_s)


async def _leg(plan: EnginePlan, requests: int) -> float:
    """Tokens/s of one leg."""
    in_flight = IN_FLIGHT_A_SLOT * plan.slots
    fixed = {"model": plan.alias, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "temperature": 0}
    async with Endpoint(plan.url, api_key=None, timeout_s=3600, connections=in_flight) as endpoint:

        async def ask(number: int) -> int:
            body = {**fixed, "prompt": f"Customer {number} {PROMPT}"}
            reply = await endpoint.post("/v1/completions", json.dumps(body).encode(), request_id=f"speed-{number}")
            if reply.status_code != 200:
                raise Fatal(f"the engine answered {reply.status_code}: {reply.body[:200].decode(errors='replace')}")
            return int(json.loads(reply.body)["usage"]["completion_tokens"])

        started = time.monotonic()
        try:
            async with asyncio.timeout(LONGEST_LEG_S):
                tokens = sum(await asyncio.gather(*(ask(number) for number in range(requests))))
        except TimeoutError as error:
            rate = requests * OUTPUT_TOKENS / LONGEST_LEG_S
            raise Fatal(f"less than {rate:.1f} tokens/s: a leg took {LONGEST_LEG_S:g} s") from error
        seconds = time.monotonic() - started
    if tokens != requests * OUTPUT_TOKENS:
        raise Fatal(f"the engine wrote {tokens} tokens, not {requests * OUTPUT_TOKENS}")
    return tokens / seconds


def _counter(show: Show, *, legs: int) -> Callable[[], None]:
    ended = 0

    def done() -> None:
        nonlocal ended
        ended += 1
        show(ended / legs)

    return done
