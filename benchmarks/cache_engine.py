"""The semantic cache before a real engine: tokens that it saves, and how much of that a constant answer would.

    python -m benchmarks.cache_engine --folder BANKING77 [--lines 4000] [--cache semantic]

Lines of BANKING77 in a seeded order, each a chat that sorts the message into one of LABELS; vLLM lets nothing else
through. `stoker run` works on them with the cache off, then with the cache, before one worker and its engine. The two
runs' answers are compared line by line: temperature 0 does not make an engine answer alike in every batch, so the lines
that differ although both runs asked it stand beside those that the cache answered otherwise.
Writes benchmarks/results/cache_engine.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.banking77 import read_lines
from benchmarks.paired import keep, made_with
from inference.checkpoints import alias_of
from runtime.settings import Settings, environment_of, load_settings
from scripts.local import local_services, local_worker, prepare_schema
from tests.support.own_services import server_folder

CHECKPOINT: Final = Path(".checkpoints") / "smollm2-135m-w8a8"
# Of fifteen prompts the one to which the 135M model gives the most even answers (1.85 bits on 300 lines; others 0 to
# 1.7): what it says is seldom true, but it is an engine's answer, and that is what the cache has to repeat.
LABELS: Final = ("Card", "Cash", "Transfer", "Exchange", "Account", "Identity")
PROMPT: Final = 'Sort the message.\nMessage: "{}"\nChoose one: ' + ", ".join(LABELS)
STOKER: Final = Path(sys.executable).with_name("stoker")


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over the lines: the summary that `stoker run` prints, and each line's answer, source and tokens."""

    summary: dict[str, Any]
    answers: list[str]
    sources: list[str]
    tokens: list[int]

    @property
    def engine_tokens(self) -> int:
        """Tokens of the answers that the engine gave, prompts included."""
        return sum(n for n, source in zip(self.tokens, self.sources, strict=True) if source == "engine")


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=4000)
    parser.add_argument("--cache", choices=("semantic", "exact"), default="semantic")
    options = parser.parse_args()
    texts, _ = read_lines(options.folder)
    order = np.random.default_rng(0).permutation(len(texts))[: options.lines]
    given = load_settings()
    engine = given.engine.model_copy(update={"kind": "vllm", "checkpoint": CHECKPOINT})
    is_semantic = options.cache == "semantic"
    with server_folder() as folder:
        # A home of its own: what an earlier run has answered is not found.
        fresh = given.model_copy(update={"engine": engine, "home": folder / "home"})
        with local_services(fresh, with_chroma=is_semantic) as settings:
            measure(settings, folder, [texts[line] for line in order], cache=options.cache)


def measure(settings: Settings, folder: Path, texts: list[str], *, cache: str) -> None:
    """Both runs before one worker; the report."""
    prepare_schema(settings)
    file = write_file(folder / "lines.jsonl", texts)
    with local_worker(settings):
        off = run(settings, file, cache="off")
        print(json.dumps(off.summary), flush=True)
        cached = run(settings, file, cache=cache)
        state = stoker(settings, "cache", "stats", "--json")
        said = stoker(settings, "cache", "certify", "--json")
    report = {"made_with": made_with(), "checkpoint": CHECKPOINT.name, "cache": cache, "labels": LABELS}
    report |= compared(off, cached) | {"cache_stats": json.loads(state), "certificates": json.loads(said)}
    keep("cache_engine", report)
    print(json.dumps(report, indent=2))


def write_file(path: Path, texts: Sequence[str]) -> Path:
    """One deterministic chat a text; submit finds the prefix and suffix that they share."""
    with path.open("w") as opened:
        for number, text in enumerate(texts):
            body = {
                "model": alias_of(CHECKPOINT),
                "temperature": 0,
                "max_tokens": 8,
                "structured_outputs": {"choice": LABELS},
                "messages": [{"role": "user", "content": PROMPT.format(text)}],
            }
            line = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def run(settings: Settings, file: Path, *, cache: str) -> Run:
    """The file through `stoker run`."""
    output = file.with_name(f"{cache}.jsonl")
    summary = stoker(settings, "run", str(file), "-o", str(output), "--cache", cache, "--json")
    results = [json.loads(line) for line in output.read_text().splitlines()]
    bodies = [result["response"]["body"] for result in results]
    return Run(
        summary=json.loads(summary),
        answers=[body["choices"][0]["message"]["content"] for body in bodies],
        sources=[result["stoker"]["source"] for result in results],
        tokens=[body["usage"]["total_tokens"] for body in bodies],
    )


def stoker(settings: Settings, *arguments: str) -> str:
    """What `stoker …` prints to stdout."""
    env = {**os.environ, **environment_of(settings)}
    ended = subprocess.run([str(STOKER), *arguments], env=env, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"stoker {arguments[0]} ended with status {ended.returncode}")
    return ended.stdout


def compared(off: Run, cached: Run) -> dict[str, Any]:
    """The two runs side by side; shares are of all lines."""
    pairs = list(zip(off.answers, cached.answers, cached.sources, strict=True))
    served = [(before, after) for before, after, source in pairs if source != "engine"]
    asked = [(before, after) for before, after, source in pairs if source == "engine"]
    answers = Counter(off.answers)
    return {
        "lines": len(pairs),
        "sources": dict(Counter(cached.sources)),
        "hits": round(len(served) / len(pairs), 4),
        "engine_tokens_off": off.engine_tokens,
        "engine_tokens_cached": cached.engine_tokens,
        "engine_tokens_cut": round(1 - cached.engine_tokens / off.engine_tokens, 4),
        "seconds_off": off.summary["seconds"],
        "seconds_cached": cached.summary["seconds"],
        "served_otherwise": round(sum(before != after for before, after in served) / len(pairs), 4),
        "engine_otherwise_of_asked": round(sum(before != after for before, after in asked) / max(1, len(asked)), 4),
        "answers": dict(answers.most_common()),
        "label_entropy_bits": round(entropy_bits(answers), 3),
        "always_majority_right": round(max(answers.values()) / len(pairs), 4),
    }


def entropy_bits(answers: Counter[str]) -> float:
    """0 where all answers are one; log2 of their number where they are even."""
    total = sum(answers.values())
    return sum(n / total * math.log2(total / n) for n in answers.values())


if __name__ == "__main__":
    main()
