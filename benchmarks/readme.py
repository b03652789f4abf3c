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
        _refill_row(_read("refill")),
        _dispatch_row(_read("dispatch")),
        _chaos_row(_read("chaos")),
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


def _refill_row(refill: dict[str, Any]) -> tuple[str, str, str]:
    tight = refill["rows"][0]
    return (
        f"starvation: slot-time empty while the batch has jobs to send, {tight['slots']:,} slots, {tight['children']} "
        "children, lognormal service times",
        ", ".join(f"**{row['starvation']:.1%}** with {row['in_flight']:,} in flight" for row in refill["rows"]),
        "`make bench-refill`",
    )


def _dispatch_row(dispatch: dict[str, Any]) -> tuple[str, str, str]:
    first, last = dispatch["rows"][0], dispatch["rows"][-1]
    return (
        f"the dispatch leader's sweep at {first['shards']:,} and at {last['shards']:,} shards; shards claimed before a "
        "new tenant's first",
        f"**{first['sweep_ms_median']:.1f} and {last['sweep_ms_median']:.1f} ms**; "
        f"{last['claims_before_the_newcomers_shards'][0]}",
        "`make bench-dispatch`",
    )


def _chaos_row(chaos: dict[str, Any]) -> tuple[str, str, str]:
    faults = len(chaos["injected"])
    return (
        f"{chaos['jobs']:,} jobs of {chaos['job_s']} s on {chaos['workers']} workers under {faults} faults, one every "
        "10 s: lost, doubled, wrongly blamed; run again",
        f"**{chaos['lost']}, {chaos['duplicated']}, {chaos['blamed']}**; {chaos['repeated'] / chaos['jobs']:.2%}",
        "`make chaos`",
    )


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    marked = re.compile(r"(<!-- figures:begin -->\n).*?(<!-- figures:end -->)", re.DOTALL)
    README.write_text(marked.sub(lambda found: f"{found[1]}{figures()}\n{found[2]}", README.read_text()))
