"""What the engines' journals say: which prompts began and ended how often, and how many a second."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter
from pathlib import Path

WINDOW_S = 1.0
STEP_S = 0.1
BEFORE_S = 5.0
FULL = 0.8


class Journal:
    """Reads the files of all engines, dead ones included, going on where it last stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self.began: Counter[str] = Counter()
        self.ended_at: list[float] = []

    def read(self) -> None:
        """Take in what was written since."""
        for file in self._folder.iterdir():
            with file.open("rb") as opened:
                opened.seek(self._offsets.get(file, 0))
                text = opened.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[file] = self._offsets.get(file, 0) + len(whole)
            for line in whole.decode().splitlines():
                what, prompt, at = line.split(" ")
                if what == "began":
                    self.began[prompt] += 1
                else:
                    self.ended_at.append(float(at))
        self.ended_at.sort()

    @property
    def repeated(self) -> int:
        """Calls that asked what had been asked before."""
        return self.began.total() - len(self.began)

    def per_second(self, until: float) -> float:
        """Jobs that ended in the second up to this moment."""
        return (bisect_left(self.ended_at, until) - bisect_left(self.ended_at, until - WINDOW_S)) / WINDOW_S

    def median_before(self, moment: float) -> float:
        """The usual speed in the seconds before."""
        steps = int((BEFORE_S - WINDOW_S) / STEP_S)
        return statistics.median(self.per_second(moment - step * STEP_S) for step in range(steps))

    def usual(self) -> float:
        """The median speed of the whole run: a fault may come while the one before still slows everything."""
        first, last = self.ended_at[0], self.ended_at[-1]
        return statistics.median(self.per_second(first + second) for second in range(1, max(2, int(last - first))))

    def seconds_to_full_speed(self, fault_at: float, *, until: float) -> float | None:
        """From the fault to the last window below 80 % of full speed; 0: none was. None: not by `until`."""
        wanted = FULL * max(self.median_before(fault_at), self.usual())
        recovered = 0.0
        dipped = False
        moment = fault_at + STEP_S
        while moment <= until:
            is_low = self.per_second(moment) < wanted
            if dipped and not is_low:
                return round(moment - fault_at, 1)
            dipped = dipped or is_low
            moment += STEP_S
        return None if dipped else recovered
