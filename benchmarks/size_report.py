"""The rows of the table of figures that benchmarks/size.py's report gives."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.rows import Row

COMMAND: Final = "`make bench-size`"


def rows(report: dict[str, Any]) -> list[Row]:
    """What ten million jobs show."""
    return []
