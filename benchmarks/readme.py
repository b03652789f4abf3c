"""Writes the measured figures of benchmarks/results/ into README.md: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def figures() -> str:
    """The table, one row a figure, with machine and command."""
    submit = _read("submit")
    rows = [
        ("figure", "measured", "command"),
        ("---", "---", "---"),
        *_end_to_end_rows(),
        *_submit_rows(submit),
        _refill_row(_read("refill")),
        _dispatch_row(_read("dispatch")),
        _chaos_row(_read("chaos")),
        *_cache_rows(),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    said = (_machine(_read(file.stem)) for file in sorted(RESULTS.glob("*.json")))
    machine = next(filter(None, said), "")
    return f"{table}\n\n{machine}A shared machine, so ratios and not seconds."


def _machine(report: dict[str, Any]) -> str:
    """What the report says of where it was measured; empty where it says nothing."""
    said = report.get("made_with", {})
    return f"On {said['cores']} cores of an {said['cpu']}, {said['date']}. " if "cpu" in said else ""


def _end_to_end_rows() -> list[tuple[str, str, str]]:
    """None until `make bench-end-to-end` has run in its present form."""
    if not (RESULTS / "end_to_end.json").exists():
        return []
    found = _read("end_to_end")
    engine = f"{found['engine']['kind']} {found['engine']['version']}, {found['engine']['checkpoint']}"
    return [
        (
            f"{row['workload']['jobs']:,} chats, {row['workload']['name']}, {row['cores']} cores, through RabbitMQ and "
            f"Postgres ÷ the bare engine ({engine}): {', '.join(row['ratio'])}; outside the engine a job, ÷ inside",
            f"{', '.join(_ratio(ratio) for ratio in row['ratio'].values())}; "
            f"{row['ours']['outside_us_a_job']:,.0f} µs, {row['ours']['outside_by_inside']:.3f}",
            "`make bench-end-to-end`",
        )
        for row in found["rows"]
    ]


def _ratio(ratio: dict[str, Any]) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})"


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


def _cache_rows() -> list[tuple[str, str, str]]:
    """The rows of `make bench-cache`: those whose part of it has run."""
    makers = {
        "cache": _certified_rows,
        "cache_gptcache": _gptcache_rows,
        "cache_lookup": _lookup_rows,
        "cache_exact": _exact_rows,
        "cache_engine": _engine_rows,
    }
    return [
        (figure, measured, "`make bench-cache FOLDER=…`")
        for name, rows in makers.items()
        if (RESULTS / f"{name}.json").exists()
        for figure, measured in rows(_read(name))
    ]


def _certified_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows, lines = found["rows"], found["lines"]
    certified = [name for name in rows if name.startswith("certified") and "drift" not in name]
    plain = [name for name in rows if name.startswith("cosine")]
    drift = next(row for name, row in rows.items() if "drift" in name)
    said = [
        (f"{lines:,} labelled queries, `{name}`: hits (second half); wrong of all", _of(rows[name]))
        for name in certified
    ]
    said += [
        (f"the same, nearest answer at {name}: hits (second half); wrong of all", _of(rows[name])) for name in plain
    ]
    streams = drift["streams_with"]
    return [
        *said,
        (
            f"{drift['streams']} shorter streams, labels change in their middle: the bound was passed at some moment "
            "in; the statement was false at some moment in",
            f"**{streams['ever_false']}**; **{streams['ever_over']}**",
        ),
    ]


def _of(row: dict[str, Any]) -> str:
    """Medians; the worst of the streams for what was wrong."""
    spread = row["min_median_max"]
    hits, half, wrong = spread["hits"], spread["hits_second_half"], spread["wrong"]
    return (
        f"**{hits[1]:.1%}** ({hits[0]:.1%} to {hits[2]:.1%}; {half[1]:.1%}); {wrong[1]:.2%}, at most **{wrong[2]:.2%}**"
    )


def _gptcache_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    hits, wrong = found["figures"]["hits"], found["figures"]["wrong"]
    version, threshold = found["made_with"]["gptcache"], found["threshold"]
    return [
        (
            f"GPTCache {version} with its defaults ({threshold}) on the same {found['lines']:,} lines, "
            f"{len(found['orders'])} orders: hits; wrong answers of all lookups",
            f"{hits['median']:.1%} ({hits['min']:.1%} to {hits['max']:.1%}); "
            f"**{wrong['median']:.1%}** ({wrong['min']:.1%} to {wrong['max']:.1%})",
        )
    ]


def _lookup_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = found["rows"]
    sizes, times = ", ".join(f"{row['entries']:,}" for row in rows), ", ".join(_in_ms(row) for row in rows)
    return [
        (
            f"semantic lookup a job, {found['lookups_a_request']} a request, at {sizes} entries, embedding apart; "
            f"recall@{found['neighbours']} at the most",
            f"**{times} ms**; {rows[-1]['recall']:.1%}; embedding {found['embedded_lines_per_s']:,} lines/s",
        )
    ]


def _in_ms(row: dict[str, Any]) -> str:
    return f"{row['ms_a_job_median']:.2f} (p95 {row['ms_a_job_p95']:.2f})"


def _exact_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cold, warm, ratio = found["rows"]["cold"], found["rows"]["warm"], found["ratio_to_off"]
    return [
        (
            f"{found['lines']:,} lines, {found['different']:,} of them different, exact cache: calls of the engine "
            "cold and when submitted again; speed ÷ without the cache, with an engine that answers at once",
            f"**{cold['calls']:,} and {warm['calls']:,}**; {ratio['cold']:.2f} and {ratio['warm']:.2f}",
        )
    ]


def _engine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            f"{found['lines']:,} lines, {len(found['labels'])} labels, `--cache {found['cache']}` before vLLM with "
            f"{found['checkpoint']}: engine tokens cut; answered otherwise than without; "
            "an always-majority answer would be right for",
            f"**{found['engine_tokens_cut']:.1%}**; {found['served_otherwise']:.2%}; "
            f"{found['always_majority_right']:.1%} ({found['label_entropy_bits']:.2f} bits)",
        )
    ]


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    marked = re.compile(r"(<!-- figures:begin -->\n).*?(<!-- figures:end -->)", re.DOTALL)
    README.write_text(marked.sub(lambda found: f"{found[1]}{figures()}\n{found[2]}", README.read_text()))
