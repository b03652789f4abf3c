"""The order of jobs on a real vLLM: what putting like prompts together saves, and where it saves nothing.

    python -m benchmarks.order [--pairs 5] [--groups 32] [--members 4] [--prefix-tokens 512] [--output-tokens 16]

Chats about documents: every group shares one. Through the whole system, from the batch's first second in progress to
its last result, the cache off:

  shuffled   a shuffled file in its own order (--order file)
  grouped    the same lines, group by group in the file, in the file's order: the best that a user could do by hand
  prefix     the shuffled file in the order that submit finds (--order prefix)

Once with a KV cache that holds a quarter of the documents, and once with one that holds them all, where there is
nothing to save. Then jobs of long and short outputs, long ones first in their groups against short ones first: the
time, and the share of it in which the last 5% of the jobs end. Every leg has documents of its own, so that nothing is
warm. About 15 minutes. Writes benchmarks/results/order.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.own_batch import ended, result_times, stored
from benchmarks.paired import PAIRS, Ratio, by_turns, keep_run, made_with
from benchmarks.place import as_submitted, own_place
from benchmarks.rows import Row, at_least, bold
from inference.engines import plan_engine
from models.states import JobOrder
from runtime.settings import Settings
from scripts.local import local_worker
from scripts.shown_batch import seconds_of
from store.database import Database

COMMAND: Final = "`make bench-order`"
POLL_S: Final = 0.1
BLOCK_TOKENS: Final = 32  # of the KV cache, as the engine is started on a CPU
SLOTS: Final = 8  # of which a shuffled file fills 7 where the room is small: no more documents fit
ROOM_SHARE: Final = 4  # the documents are so many times the room
MODEL: Final = "smollm2-135m"
MIXED_TOKENS: Final = (8, 8, 8, 96)
WORDS: Final = "account answer balance branch card cash date fee limit loan order rate"


@dataclass(frozen=True, slots=True)
class Leg:
    """What one batch took. `tail` is the share of the time in which the last 5% of its jobs ended."""

    seconds: float
    prompt_tokens: int
    cached_tokens: int
    tail: float


@dataclass(frozen=True, slots=True)
class Side:
    """How a leg's file is written, and the order in which it is run."""

    shuffled: bool
    order: JobOrder


SHUFFLED, GROUPED, PREFIX = "shuffled", "grouped", "prefix"
SIDES: Final = {
    SHUFFLED: Side(shuffled=True, order=JobOrder.FILE),
    GROUPED: Side(shuffled=False, order=JobOrder.FILE),
    PREFIX: Side(shuffled=True, order=JobOrder.PREFIX),
}
BY_OUTPUT: Final = {
    "long first": Side(shuffled=True, order=JobOrder.PREFIX),
    "short first": Side(shuffled=True, order=JobOrder.PREFIX_SHORT),
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--prefix-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=16)
    options = parser.parse_args()
    room = options.groups * options.prefix_tokens // ROOM_SHARE // BLOCK_TOKENS
    alike, mixed = (options.output_tokens,), MIXED_TOKENS
    report: dict[str, Any] = {"made_with": made_with("celery"), "options": vars(options)}
    report |= {"kv_blocks": room, "slots": SLOTS}
    numbers = itertools.count()  # of the legs, over all engines
    with own_place() as place, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        report |= {"servers": place.versions(), "engine": described(place.settings)}
        with local_worker(served(place.settings, blocks=room)):
            report["fits_not"] = measured(place.settings, file, options, SIDES, numbers=numbers, outputs=alike)
        with local_worker(served(place.settings, blocks=None)):
            report["fits"] = measured(place.settings, file, options, SIDES, numbers=numbers, outputs=alike)
            report["by_output"] = measured(place.settings, file, options, BY_OUTPUT, numbers=numbers, outputs=mixed)
    report["table"] = [row.as_json() for row in rows_of(report)]
    keep_run("order", report, parser, options)


def described(settings: Settings) -> dict[str, str]:
    """The engine's flags, checkpoint and digest."""
    plan = plan_engine(served(settings, blocks=None).engine, socket=Path("engine.sock"))
    assert plan is not None
    return dict(plan.description)


def served(settings: Settings, *, blocks: int | None) -> Settings:
    """A worker with an engine of few slots, and a KV cache of so many blocks."""
    args = "" if blocks is None else f"--num-gpu-blocks-override {blocks}"
    context = settings.engine.context_tokens
    if blocks is not None:  # the engine keeps one block for itself, and refuses a context that would never fit
        context = min(context, (blocks - 1) * BLOCK_TOKENS)
    changed = {"max_num_seqs": SLOTS, "args": args, "context_tokens": context}
    engine = settings.engine.model_copy(update={**changed, "url": None, "kind": "vllm"})
    return settings.model_copy(update={"engine": engine})


def measured(
    settings: Settings,
    file: Path,
    options: argparse.Namespace,
    sides: dict[str, Side],
    *,
    numbers: Iterator[int],
    outputs: Sequence[int],
) -> dict[str, Any]:
    """Every side's legs by turns, after one of the first that is not counted."""
    legs: dict[str, list[Leg]] = {name: [] for name in sides}

    def run(side: Side, *, is_fresh: bool = False) -> Leg:
        write_file(file, options, leg=next(numbers), shuffled=side.shuffled, outputs=outputs)
        return run_leg(settings, file, order=side.order, is_fresh=is_fresh)

    def turn(name: str) -> float:
        legs[name].append(run(sides[name]))
        print(name, legs[name][-1], flush=True)
        return legs[name][-1].seconds

    names = list(sides)
    run(sides[names[0]], is_fresh=True)
    seconds = by_turns({name: partial(turn, name) for name in names}, pairs=options.pairs)
    ratios = {other: asdict(Ratio.of(seconds[names[0]], seconds[other])) for other in names[1:]}
    return {
        "ratio_of_speed_to": names[0],
        "ratio": ratios,
        "legs": {name: [asdict(leg) for leg in ended] for name, ended in legs.items()},
    }


def write_file(path: Path, options: argparse.Namespace, *, leg: int, shuffled: bool, outputs: Sequence[int]) -> None:
    """A batch file: all members of all groups. The leg's number begins every document, so that none is known."""
    lines = []
    for group in range(options.groups):
        draw = random.Random(1000 * leg + group)  # prompts, no secret
        document = f"{leg} {group} " + " ".join(draw.choices(WORDS.split(), k=options.prefix_tokens))
        for member in range(options.members):
            messages = [
                {"role": "system", "content": document},
                {"role": "user", "content": f"Question {member}: which word comes most often?"},
            ]
            tokens = outputs[member % len(outputs)]
            body = {"model": MODEL, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "messages": messages}
            name = f"{group}-{member}"
            lines.append({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
    if shuffled:
        random.Random(leg).shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_leg(settings: Settings, file: Path, *, order: JobOrder, is_fresh: bool) -> Leg:
    """One batch through the worker that runs; SystemExit if a job failed. `is_fresh`: it is the worker's first."""
    database = Database(settings.require_postgres())
    try:
        batch_id = stored(
            database, file, as_submitted(settings, is_fresh=is_fresh), max_output_tokens=1024, order=order
        )
        progress = ended(database, batch_id, poll_s=POLL_S)
        _, tail_s = result_times(database, batch_id)
    finally:
        database.close()
    if progress.failed or progress.done != progress.total:
        raise SystemExit(f"{progress.done} of {progress.total} jobs done, {progress.failed} failed")
    seconds = seconds_of(progress)
    return Leg(seconds, progress.prompt_tokens, progress.cached_tokens, round(tail_s / seconds, 4))


def rows_of(report: dict[str, Any]) -> list[Row]:
    """The figures of the table."""
    options = report["options"]
    jobs = options["groups"] * options["members"]
    shape = f"{jobs} jobs about {options['groups']} documents of some {options['prefix_tokens']} tokens"
    rows = []
    for key, room in (("fits_not", f"the KV cache holds 1 in {ROOM_SHARE} of them"), ("fits", "all of them fit")):
        for side, spread in report[key]["ratio"].items():
            ratio = Ratio(**spread)
            is_main = key == "fits_not" and side == PREFIX
            rows.append(
                Row(
                    f"{shape}, {room}: speed in {side} order ÷ shuffled; prompt tokens from the prefix cache",
                    f"{bold(ratio)}; {share(report[key], side):.0%} and {share(report[key], SHUFFLED):.0%}",
                    COMMAND,
                    headline=is_main,
                    **(at_least(ratio, 1.2) if is_main else {}),
                )
            )
    by_output = report["by_output"]
    tails = {name: sorted(leg["tail"] for leg in legs)[len(legs) // 2] for name, legs in by_output["legs"].items()}
    rows.append(
        Row(
            f"{shape}, outputs of {', '.join(map(str, MIXED_TOKENS))} tokens: speed with short ones first in their "
            "groups ÷ long ones first; time of the last 5% of the jobs, short and long first",
            f"{bold(Ratio(**by_output['ratio']['short first']))}; {tails['short first']:.1%} and "
            f"{tails['long first']:.1%}",
            COMMAND,
        )
    )
    return rows


def share(part: dict[str, Any], side: str) -> float:
    """Cached prompt tokens by all."""
    legs = part["legs"][side]
    return float(sum(leg["cached_tokens"] for leg in legs) / sum(leg["prompt_tokens"] for leg in legs))


if __name__ == "__main__":
    main()
