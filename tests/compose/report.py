"""The table of `make compose-dry`, for a terminal and for docs/compose.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.support.processes import REPOSITORY

PAGE = REPOSITORY / "docs" / "compose.md"
MARKED = re.compile(r"(<!-- compose-dry:begin -->\n).*?(<!-- compose-dry:end -->)", re.DOTALL)
HEAD = (
    "service",
    "image, and what stood in",
    "user",
    "healthy after",
    "memory",
    "listens",
    "world",
    "stopped after, exit code",
)


def printed(report: dict[str, Any]) -> str:
    """The table and the steps."""
    return "\n".join(["", *_table(report), "", *_steps(report), ""])


def write_docs(report: dict[str, Any], page: Path = PAGE) -> None:
    """Put them into the page, between its marks."""
    text = page.read_text()
    made = report["machine"]
    told = (
        f"{made['date']}, {made['cores']} cores, commit {made['commit']}, Docker {report['engine']}, "
        f"{report['seconds']} s."
    )
    shown = "\n".join(["", *_table(report), "", *_steps(report), "", told, ""])
    page.write_text(MARKED.sub(lambda marks: f"{marks[1]}{shown}{marks[2]}", text))


def _table(report: dict[str, Any]) -> list[str]:
    lines = [_line(HEAD), _line("---" for _ in HEAD)]
    for name, row in report["services"].items():
        image = row["image"] if "made_of" not in row else f"{row['image']}: {row['made_of']}"
        if "not_run" in row:
            lines.append(_line([name, image, "", f"not run: {row['not_run']}", "", "", "", ""]))
            continue
        ports = ", ".join(f"{address}:{port}" for address, port in row.get("ports", ()))
        memory = (
            f"{row['memory_bytes'] / 1e6:,.0f} of {row['memory_limit_bytes'] / 1e6:,.0f} MB"
            if "memory_bytes" in row
            else ""
        )
        ended = (
            f"{row['stop_s']} s of {row['stop_grace']}, {row['exit_code']}"
            if "stop_s" in row
            else f"by itself, {row['exit_code']}"
        )
        world = {True: "reached", False: "not reached", None: ""}[row["reaches_world"]]
        healthy = "" if row["healthy_s"] is None else f"{row['healthy_s']:.1f} s"
        lines.append(_line([name, image, row["user"], healthy, memory, ports, world, ended]))
    return lines


def _steps(report: dict[str, Any]) -> list[str]:
    return [
        f"- {'ok' if step['is_well'] else 'FAILED'}, {step['seconds']:.0f} s: {step['what']}"
        + (f" ({step['said']})" if step["said"] else "")
        for step in report["steps"]
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
