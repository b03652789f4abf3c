"""How a speed is measured here: two sides by turns in one run, and the ratio of each pair.

A machine drifts: by heat, by its neighbours, by what the page cache holds. Sides that take turns (A B, B A, A B, …)
drift alike, so the pairs' ratios say what is being asked, and their spread says how well it is known.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.clock import utc_now

RESULTS = Path(__file__).parent / "results"
PAIRS = 5
WRITTEN_BY_RUNS = ("benchmarks/results", "README.md", "docs/benchmarks.md")


def commit_of(repository: Path) -> str:
    """Its commit, with `-dirty` if anything else has changed than what runs write themselves."""

    def git(*arguments: str) -> str:
        asked = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    others = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN_BY_RUNS))
    commit = git("rev-parse", "--short=7", "HEAD") or "unknown"
    return f"{commit}-dirty" if others else commit


COMMIT = commit_of(RESULTS.parents[1])  # when the process starts: a run may outlive its commit
LOAD_BEFORE = os.getloadavg()[0]


@dataclass(frozen=True, slots=True)
class Ratio:
    """What the pairs gave: the median, the least and the most."""

    median: float
    least: float
    most: float
    pairs: list[float]

    @classmethod
    def of(cls, above: list[float], below: list[float]) -> Ratio:
        """The ratios of what was measured pair by pair."""
        pairs = [round(a / b, 4) for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(pairs), min(pairs), max(pairs), pairs)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def by_turns(sides: Mapping[str, Callable[[], float]], *, pairs: int = PAIRS) -> dict[str, list[float]]:
    """What every side gave in each of its turns: A B, B A, A B, … so that no side is always the first."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        names = list(sides)
        for name in names if pair % 2 == 0 else reversed(names):
            measured[name].append(sides[name]())
    return measured


def made_with(*packages: str) -> dict[str, Any]:
    """Where, when and with what the figures are measured; `packages` are distributions of this environment.

    `load_before`: processes that wanted to run in the minute before, our own start included.
    """
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return {
        "date": utc_now().date().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": COMMIT,
        "load_before": round(LOAD_BEFORE, 2),
        **found,
    }


def keep(name: str, report: Mapping[str, Any], *, is_whole: bool = True) -> Path:
    """Write a benchmark's report to benchmarks/results/: where.

    One that is not whole goes to NAME.partial.json, which no table shows and git ignores.
    """
    path = RESULTS / f"{name}{'' if is_whole else '.partial'}.json"
    written = path.with_suffix(".writing")
    written.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    written.replace(path)
    return path


def keep_run(
    name: str,
    report: Mapping[str, Any],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    is_whole: bool = True,
) -> None:
    """Keep a run's report, and say where: in the published one's place only if it has the same options."""
    is_default = all(value == parser.get_default(option) for option, value in vars(options).items())
    print(f"kept in {keep(name, report, is_whole=is_whole and is_default)}")


def _cpu() -> str:
    """Its name, and whether it has AVX-512, which decides how fast vLLM is on a CPU."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    said = {name.strip(): value.strip() for name, _, value in pairs}
    has = "with" if "avx512f" in said.get("flags", "").split() else "without"
    return f"{said.get('model name', platform.machine())} {has} AVX-512"
