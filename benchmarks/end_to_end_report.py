"""What the legs of benchmarks/end_to_end.py say: the rows of the table, and what holds for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.paired import Ratio
from benchmarks.rows import STARVATION, Row, at_least, at_most, bold, spread_of

COMMAND: Final = "`make bench-end-to-end`"
# Targets of ours ÷ the bare engine.
TARGETS: Final = {
    ("pinned", "8 tokens", "chat"): 0.85,
    ("pinned", "64 tokens", "chat"): 0.95,
    ("pinned", "256 tokens", "chat"): 0.95,
    ("pinned", "64 tokens", "run-batch"): 0.97,
}
BARE: Final = {
    "chat": "vLLM's offline LLM.chat",
    "run-batch": "vLLM's run-batch",
    "http": "our client straight to vLLM's server",
}
SHOWN: Final = "64 tokens"


def rows_of(found: Mapping[str, Any]) -> list[Row]:
    """Every row, the targets with it."""
    rows = []
    for measured in found["rows"]:
        workload, cores, jobs = measured["workload"]["name"], measured["cores"], measured["workload"]["jobs"]
        where = "pinned" if cores == "pinned" else "all cores"
        for side, spread in measured["ratio"].items():
            ratio, target = Ratio(**spread), TARGETS.get((cores, workload, side))
            rows.append(
                Row(
                    f"{workload}, {jobs:,} jobs: tokens/s end to end ÷ {BARE[side]}; {where}",
                    bold(ratio),
                    COMMAND,
                    headline=side != "http",
                    **({} if target is None else at_least(ratio, target)),
                )
            )
        ours = measured["ours"]
        figure = f"{workload}: slots empty while there is something to send, by vLLM's /load; {where}"
        starvation = ours["starvation"]
        starved = at_most(100 * statistics.median(starvation), 100 * STARVATION, "%")
        rows.append(
            Row(
                figure,
                spread_of(starvation),
                COMMAND,
                headline=cores == "pinned" and workload == SHOWN,
                **starved,
            )
        )
        figure = (
            f"{workload}: CPU outside ÷ inside the engine; µs outside it a job, what idle processes and our watching "
            f"take included; {where}"
        )
        outside = f"**{ours['outside_by_inside']:.3f}**; {ours['outside_us_a_job']:,.0f}"
        rows.append(Row(figure, outside, COMMAND, headline=cores == "pinned" and workload == SHOWN))
    return rows


def note_of(found: Mapping[str, Any]) -> str:
    """What every row has in common."""
    engine, slots = found["engine"], found["options"]["slots"]
    return (
        f"End to end is a batch of {engine['checkpoint']} on vLLM {engine['version']} with {slots} slots, through "
        "RabbitMQ and Postgres; pinned: the engine on one core, all else on another; the cache is off. run-batch "
        "stands beside it at 64 tokens only, for the time that it takes."
    )
