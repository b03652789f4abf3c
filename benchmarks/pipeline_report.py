"""What the legs of benchmarks/pipeline.py say: ratios, CPU by stage, the rows of the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.paired import Ratio
from benchmarks.rows import Row, at_least, at_most, bold

COMMAND: Final = "`make bench-pipeline`"
OURS, CELERY, RAY = "ours", "one Celery task per prompt", "Ray Data"
UNSHARDED, UNIX = "ours, one job a shard", "ours, over a unix socket"
PLACES: Final = {"one_core": "on one core", "all_cores": "on all cores"}
THREADS: Final = "threads"
TARGET, TARGET_US = 15.0, 250.0


def celery_side(pool: str, size: int) -> str:
    """The name of Celery's side with this pool."""
    return f"{CELERY} ({pool} {size})"


def best_celery(found: Mapping[str, Any], pool: str = "prefork") -> str:
    """The size of the pool that did best in this place, by its median."""
    speeds: dict[str, list[float]] = found["jobs_per_s"]
    sizes = (name for name in speeds if name.startswith(f"{CELERY} ({pool}"))
    return max(sizes, key=lambda name: statistics.median(speeds[name]))


def report_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, with the ratios and the rows of the table."""
    report = dict(found)
    for place in PLACES:
        speeds = found[place]["jobs_per_s"]
        ratios = {name: Ratio.of(speeds[OURS], speeds[name]) for name in speeds if name != OURS}
        report[place] = {
            **found[place],
            "ours_to": {name: asdict(ratio) for name, ratio in ratios.items()},
            "cpu_us": {name: _median_us(legs) for name, legs in found[place]["legs"].items()},
        }
    return {**report, "table": [row.as_json() for row in rows(report)]}


def rows(report: Mapping[str, Any]) -> list[Row]:
    """Every row, the targets with it."""
    one = report["one_core"]
    outside = [leg["cpu_us_outside"] for leg in one["legs"][OURS]]
    stages = {name: spent for name, spent in one["cpu_us"][OURS].items() if name != "endpoint"}
    shares = ", ".join(f"{name} {spent:.0f}" for name, spent in stages.items() if spent >= 0.5)
    without_submit = [leg["cpu_us_outside"] - leg["cpu_us"]["submit"] for leg in one["legs"][OURS]]
    cpu = Ratio.of([leg["cpu_us_outside"] for leg in one["legs"][best_celery(one)]], without_submit)
    found = [
        *(_against(report, place, best_celery(report[place]), headline=place == "one_core") for place in PLACES),
        *(
            _against(report, place, best_celery(report[place], THREADS), headline=place == "one_core")
            for place in PLACES
        ),
        Row(
            "shards as `stoker submit` cuts them ÷ one job a shard, which pays the whole shard protocol for each job",
            f"{bold(_ratio(one, UNSHARDED))}; {_speed(one, UNSHARDED)} jobs/s with 1, "
            f"where one Celery task per prompt does {_speed(one, best_celery(one))}",
            COMMAND,
        ),
        Row(
            "CPU of a job outside the endpoint, µs: submit, worker, dispatch, Postgres, RabbitMQ, Redis; "
            "and that of one Celery task per prompt ÷ it, both without submitting",
            f"**{statistics.median(outside):.0f}** ({min(outside):.0f} to {max(outside):.0f}): {shares}; {bold(cpu)}",
            COMMAND,
            headline=True,
            **at_most(statistics.median(outside), TARGET_US, " µs"),
        ),
        Row("the pipeline over TCP ÷ over a unix socket, on one core", bold(_ratio(one, UNIX)), COMMAND),
    ]
    if RAY in one["ours_to"]:
        found += [_against(report, place, RAY, headline=place == "one_core") for place in PLACES]
    return found


def show(report: Mapping[str, Any]) -> None:
    """The figures, CPU by stage and the profile, on standard output."""
    console = Console(width=150)
    for place, words in PLACES.items():
        console.print(_speeds_table(report[place], words))
    console.print(_stages_table(report["one_core"]["cpu_us"]))
    profile = report["profile"]
    if "why_not" in profile:
        console.print(f"no profile: {profile['why_not']}", markup=False)
    else:
        table = Table("share", "function, by its own time (one child of our worker)")
        for name, share in profile["functions"].items():
            table.add_row(f"{share:.1%}", name)
        console.print(table)
        console.print(", ".join(f"{name} {share:.1%}" for name, share in profile["packages"].items()), markup=False)
    for row in rows(report):
        console.print(f"{row.figure}: {row.measured} {row.verdict}".replace("**", ""), markup=False)


def _against(report: Mapping[str, Any], place: str, side: str, *, headline: bool) -> Row:
    found, words = report[place], PLACES[place]
    ratio = _ratio(found, side)
    is_judged = side == best_celery(found)
    if is_judged:
        named = f"{side}, the best of three sizes"
    elif side == RAY:
        named = f"{side} with aiohttp, which has no durability a job"
    else:
        stalled = found["stalled"].get(side, 0)
        named = f"{side}, which stopped for good in {stalled} of {len(found['legs'][side]) + stalled} legs"
    apart = f", {report['endpoint']} on another" if place == "one_core" else ""
    return Row(
        f"pipeline on a zero-latency endpoint ÷ {named}; {words}{apart}",
        f"{bold(ratio)}; {_speed(found, OURS)} and {_speed(found, side)} jobs/s",
        COMMAND,
        headline=headline,
        **(at_least(ratio, TARGET) if is_judged and place == "one_core" else {}),
    )


def _ratio(found: Mapping[str, Any], side: str) -> Ratio:
    return Ratio(**found["ours_to"][side])


def _speed(found: Mapping[str, Any], side: str) -> str:
    return f"{statistics.median(found['jobs_per_s'][side]):,.0f}"


def _median_us(legs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(leg["cpu_us"][name] for leg in legs) for name in legs[0]["cpu_us"]}


def _speeds_table(found: Mapping[str, Any], words: str) -> Table:
    table = Table("", "jobs/s", "least to most", "ours ÷ it", title=words)
    for name, speeds in found["jobs_per_s"].items():
        ratio = "" if name == OURS else str(_ratio(found, name))
        table.add_row(name, _speed(found, name), f"{min(speeds):,.0f} to {max(speeds):,.0f}", ratio)
    return table


def _stages_table(spent: Mapping[str, Mapping[str, float]]) -> Table:
    stages = list(dict.fromkeys(stage for side in spent.values() for stage in side))
    table = Table("CPU seconds of 1,000 jobs", *spent, title="by stage, on one core")
    for stage in stages:
        table.add_row(stage, *(f"{side[stage] / 1000:.3f}" if stage in side else "" for side in spent.values()))
    return table
