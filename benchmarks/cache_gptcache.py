"""GPTCache itself, as it is shipped, on the same streams as benchmarks.cache: `make bench-cache FOLDER=banking77`.

    .venv-gptcache/bin/python -m benchmarks.cache_gptcache --folder BANKING77 [--orders 5]

Everything is what its `init_similar_cache` sets up without being told: sqlite and faiss, a threshold of 0.8 on
SearchDistanceEvaluation, the least recently used of 1,000 entries evicted. Only the embedder is ours, the int8 MiniLM,
because its own fetches weights. A query is looked up; a hit is compared with the label, a miss is put. Vectors are
computed beforehand, so that its times are without them. Writes benchmarks/results/cache_gptcache.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from gptcache import Cache, Config
from gptcache.adapter.api import get, init_similar_cache, put

from benchmarks.banking77 import EMBEDDER, read_lines
from benchmarks.paired import COMMIT
from cache.embedder import OnnxEmbedder
from cache.score import Vectors

RESULT = Path(__file__).parent / "results" / "cache_gptcache.json"
MOST_SECONDS = 480  # no further order is begun after these


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stream from an empty cache: shares of all lookups, and milliseconds without the embedding."""

    hits: float
    hits_second_half: float
    wrong: float
    wrong_second_half: float
    lookup_ms_median: float
    lookup_ms_p95: float
    put_ms_median: float
    seconds: float


class Vectored:
    """Vectors that are known by their texts, as GPTCache asks for an embedding."""

    def __init__(self, texts: list[str], vectors: Vectors) -> None:
        self.dimension = vectors.shape[1]
        self._vectors: dict[str, Vectors] = dict(zip(texts, vectors, strict=True))

    def to_embeddings(self, text: str, **_: object) -> Vectors:
        """The vector of a text; GPTCache passes more than that."""
        return self._vectors[text]


def run(texts: list[str], labels: list[str], embedder: Vectored, *, seed: int) -> Outcome:
    """The stream in the seeded order that benchmarks.cache takes too."""
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    served, wrong = np.zeros(len(order), bool), np.zeros(len(order), bool)
    looked: list[float] = []
    stored: list[float] = []
    cache, began = Cache(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gptcache-") as folder:
        init_similar_cache(data_dir=folder, cache_obj=cache, embedding=embedder)
        for place, line in enumerate(order):
            start = time.monotonic()
            answer = get(texts[line], cache_obj=cache)
            looked.append(time.monotonic() - start)
            if answer is None:
                start = time.monotonic()
                put(texts[line], labels[line], cache_obj=cache)
                stored.append(time.monotonic() - start)
            else:
                served[place], wrong[place] = True, answer != labels[line]
        cache.flush()
    half = len(order) // 2
    return Outcome(
        hits=float(served.mean()),
        hits_second_half=float(served[half:].mean()),
        wrong=float(wrong.mean()),
        wrong_second_half=float(wrong[half:].mean()),
        lookup_ms_median=1000 * statistics.median(looked),
        lookup_ms_p95=1000 * float(np.percentile(looked, 95)),
        put_ms_median=1000 * statistics.median(stored),
        seconds=time.monotonic() - began,
    )


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=5)
    options = parser.parse_args()
    os.environ["PATH"] = os.devnull  # it runs `pip install` for what it misses: it shall find no pip, and fail
    os.environ["OMP_NUM_THREADS"] = "1"  # faiss's threads wait for each other longer than they work on 1,000 vectors
    os.environ["IS_CI"] = "1"  # at exit it writes each index once more, to a folder that is gone: let it not say so
    texts, labels = read_lines(options.folder)
    embedder = Vectored(texts, OnnxEmbedder(EMBEDDER).embed(texts))
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for seed in range(options.orders):
        if time.monotonic() - began < MOST_SECONDS:
            outcomes.append(run(texts, labels, embedder, seed=seed))
            print(f"order {seed}: {outcomes[-1]}", flush=True)
    report = {
        "made_with": {"commit": COMMIT, "gptcache": importlib.metadata.version("gptcache")},
        "lines": len(texts),
        "threshold": Config().similarity_threshold,
        "embedder": "all-MiniLM-L6-v2 int8 instead of its own, whose weights it fetches",
        "orders_asked": options.orders,
        "figures": spread(outcomes),
        "orders": [asdict(outcome) for outcome in outcomes],
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["figures"], indent=2))


def spread(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Least, median and most of each figure over the orders."""
    rows = [asdict(outcome) for outcome in outcomes]
    return {
        name: {
            "min": min(row[name] for row in rows),
            "median": statistics.median(row[name] for row in rows),
            "max": max(row[name] for row in rows),
        }
        for name in rows[0]
    }


if __name__ == "__main__":
    main()
