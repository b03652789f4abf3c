"""What upgrades under load gave, for docs/upgrade.md and the table of all figures: `python -m tests.upgrade.report`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from benchmarks.paired import RESULTS
from benchmarks.rows import Row, at_most
from tests.support.processes import REPOSITORY

COMMAND: Final = "`make upgrade`"
# What a statement may wait for a table: migrations/env.py lets a migration wait for half a second, and then it is
# quick. On a machine that others use, too.
TABLE_WAIT_S: Final = 2.0
DOCUMENT: Final = REPOSITORY / "docs" / "upgrade.md"
KEPT: Final = RESULTS / "upgrade.json"
_MARKED: Final = re.compile(r"(<!-- upgrade:begin -->\n).*?(<!-- upgrade:end -->)", re.DOTALL)


def main() -> None:
    """Write the table into the document."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(), KEPT))


def document(text: str, kept: Path) -> str:
    """The document with what a kept report says in its place; as it is if there is none."""
    if not kept.exists():
        return text
    report = json.loads(kept.read_text())
    made = report["made_with"]
    parts = [_table(upgrade) for upgrade in report["upgrades"]]
    parts.append(f"On {made['cpu']}, {made['cores']} cores, {made['date']}, load before {made['load_before']}.")
    whole = "\n\n".join(parts)
    written, times = _MARKED.subn(lambda marks: f"{marks[1]}{whole}\n{marks[2]}", text)
    assert times == 1, "one place for the table"
    return written


def row(upgrade: dict[str, Any]) -> Row:
    """One upgrade in the table of all figures."""
    gaps = {phase["name"]: phase["longest_gap_s"] for phase in upgrade["phases"]}
    waits = max(phase["longest_table_wait_s"] for phase in upgrade["phases"])
    before = next(iter(gaps.values()))
    ended = f"{upgrade['jobs']:,} jobs, lost {upgrade['lost']}, failed {upgrade['failed']}"
    return Row(
        f"upgrade of revision {upgrade['revision']} to {upgrade['to_revision']} under load: longest wait for a table",
        f"**{waits:.2f} s**; without a result {gaps['migration']} s in the migration, {before} s before; {ended}",
        COMMAND,
        **at_most(waits, TABLE_WAIT_S, " s"),
    )


def _table(upgrade: dict[str, Any]) -> str:
    lines = [
        f"From commit {upgrade['commit']}, revision {upgrade['revision']}, to {upgrade['to_revision']}: "
        f"{upgrade['batches']} batches, {upgrade['jobs']:,} jobs, lost {upgrade['lost']}, failed {upgrade['failed']}, "
        f"asked twice of an engine {upgrade['repeated']}; the client asked again {upgrade['tried_again']} times.",
        "",
        "| phase | s | results | longest time without one, s | waits for a table | the longest, s |",
        "|---|---|---|---|---|---|",
    ]
    for phase in upgrade["phases"]:
        cells = [phase[key] for key in ("name", "seconds", "jobs", "longest_gap_s", "table_waits")]
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, phase["longest_table_wait_s"])) + " |")
    lines += ["", "| looked at | seen |", "|---|---|"]
    lines += [f"| {note['what']} | {note['seen']} |" for note in upgrade["notes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
