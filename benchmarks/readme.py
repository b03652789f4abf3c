"""Writes the measured figures of benchmarks/results/ into README.md: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def figures() -> str:
    """The table, one row a figure, with machine and command."""
    whole, submit = _read("end_to_end"), _read("submit")
    through = statistics.median(whole["through_s"])
    rows = [
        ("figure", "measured", "command"),
        ("---", "---", "---"),
        (
            f"{whole['jobs']:,} chats of {whole['output_tokens']} tokens through RabbitMQ and Postgres "
            f"÷ straight to the same engine "
            f"({whole['engine']['kind']} {whole['engine']['version']}, {whole['engine']['checkpoint']})",
            f"**{whole['ratio']:.2f}** (pairs {', '.join(f'{r:.2f}' for r in whole['ratios'])}); "
            f"{whole['tokens'] / through:.0f} tokens/s",
            "`make bench-end-to-end CSV=…`",
        ),
        *_submit_rows(submit),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    machine = f"{whole['cores']} cores of an {whole['cpu']}, {whole['date']}"
    return f"{table}\n\nOn {machine}; a shared machine, so ratios and not seconds."


def _submit_rows(submit: dict[str, Any]) -> list[tuple[str, str, str]]:
    names = {
        "write_row": "plain psycopg COPY (write_row) of the same rows",
        "binary blocks": "COPY of ready-made binary blocks",
    }
    return [
        (
            f"submit of {submit['lines']:,} lines ÷ {name}",
            f"**{submit['ratio'][key]['median']:.2f}** "
            f"({submit['ratio'][key]['least']:.2f} to {submit['ratio'][key]['most']:.2f}); "
            f"{submit['lines_per_second']['submit']:,.0f} lines/s, peak {submit['peak_mb']['submit']:.0f} MB",
            "`make bench-submit`",
        )
        for key, name in names.items()
    ]


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    marked = re.compile(r"(<!-- figures:begin -->\n).*?(<!-- figures:end -->)", re.DOTALL)
    README.write_text(marked.sub(lambda found: f"{found[1]}{figures()}\n{found[2]}", README.read_text()))
