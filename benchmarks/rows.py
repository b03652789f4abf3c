"""A row of the table of figures, as every benchmark keeps it in its JSON under `table`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.paired import PAIRS, Ratio

STARVATION = 0.02  # target: slots' time without a request while there are jobs
COLUMNS = ("figure", "measured", "target", "command")


@dataclass(frozen=True, slots=True)
class Row:
    """`headline`: stands in README.md too. `target` is what it should be; `is_met` None where there is none."""

    figure: str
    measured: str
    command: str
    headline: bool = False
    target: str = ""
    is_met: bool | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def cells(self) -> tuple[str, ...]:
        """One for each of COLUMNS."""
        return self.figure, self.measured, self.verdict, self.command

    @property
    def verdict(self) -> str:
        """What to say of the target, in a few words."""
        if self.is_met is None:
            return self.target
        return f"{self.target} met" if self.is_met else f"**short of {self.target}**"


def at_least(ratio: Ratio, target: float) -> dict[str, Any]:
    """The `target` and `is_met` of a row whose median should reach it."""
    return {"target": f"≥ {target:g}", "is_met": ratio.median >= target}


def at_most(figure: float, target: float, unit: str = "") -> dict[str, Any]:
    """The same of a figure that should not be above it."""
    return {"target": f"≤ {target:g}{unit}", "is_met": figure <= target}


def spread_of(shares: Sequence[float]) -> str:
    """The median of runs' shares, and the least and the most beside it."""
    return f"**{statistics.median(shares):.1%}** ({min(shares):.1%} to {max(shares):.1%}; {len(shares)} runs)"


def bold(ratio: Ratio) -> str:
    """The median, and the spread beside it; how many pairs, where they are fewer than they should be."""
    few = "" if len(ratio.pairs) >= PAIRS else f"; {len(ratio.pairs)} pairs"
    return f"**{ratio.median:.2f}** ({ratio.least:.2f} to {ratio.most:.2f}{few})"
