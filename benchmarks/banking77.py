"""BANKING77 as the benchmarks of the cache read it: customers' messages, each with the intent that it was given."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

EMBEDDER: Final = Path(__file__).parents[1] / ".checkpoints" / "minilm-l6-v2-int8"


def read_lines(folder: Path) -> tuple[list[str], list[str]]:
    """Texts and intents of train.csv, then test.csv: 13,083 lines."""
    rows: list[tuple[str, str]] = []
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows += [(row["text"], row["category"]) for row in csv.DictReader(file)]
    return [text for text, _ in rows], [intent for _, intent in rows]
