"""The rows of `make bench-cache`, from the JSON that each part of it has kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from benchmarks.rows import Row

COMMAND: Final = "`make bench-cache FOLDER=banking77`"
HEADLINES: Final = ("`certified at 1%`", "GPTCache", "semantic lookup", "exact cache")


def cache_rows(part: str, found: dict[str, Any]) -> list[Row]:
    """The rows of one part, such as `cache_lookup`."""
    return [
        Row(figure, measured, COMMAND, headline=any(words in figure for words in HEADLINES))
        for figure, measured in PARTS[part](found)
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
            f"{found['checkpoint']}: engine tokens cut; speed ÷ without; answered otherwise than without; "
            "an always-majority answer would be right for",
            f"**{found['engine_tokens_cut']:.1%}**; **{found['seconds_off'] / found['seconds_cached']:.2f}**, one run; "
            f"{found['served_otherwise']:.2%}; "
            f"{found['always_majority_right']:.1%} ({found['label_entropy_bits']:.2f} bits)",
        )
    ]


PARTS: Final[dict[str, Callable[[dict[str, Any]], list[tuple[str, str]]]]] = {
    "cache": _certified_rows,
    "cache_gptcache": _gptcache_rows,
    "cache_lookup": _lookup_rows,
    "cache_exact": _exact_rows,
    "cache_engine": _engine_rows,
}
