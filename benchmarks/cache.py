"""The semantic cache on labelled queries: hits, and answers that are other than the engine's.

    python -m benchmarks.cache --folder BANKING77 [--orders 5] [--drifts 100]

The answer of a query is its label. Every line is a stream from an empty cache, in shards of 64 whose lines do not see
each other, in seeded orders; the pilot is drawn first, as submit does. Beside it plain thresholds on the cosine with
the same embedder, the stream sorted by its text, and shorter streams whose labels change in their middle, to count how
often the certificate's sentence was false at any moment. Neighbours are exact here (a product of matrices).
Writes benchmarks/results/cache.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.certificate import coin
from cache.embedder import OnnxEmbedder
from cache.guards import Signature, signature
from cache.model import Model
from cache.namespace import Decided, Found, Judged, Query, adopt, decide, fit, is_fit_due, judge
from cache.policy import Limits, Policy, pilot_size
from cache.score import NEIGHBOURS, Vectors, overlap, words

RESULT = Path(__file__).parent / "results" / "cache.json"
EMBEDDER = Path(__file__).parents[1] / ".checkpoints" / "minilm-l6-v2-int8"
SHARD = 64
Order = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Queries:
    """Labelled queries with their vectors."""

    texts: list[str]
    labels: list[str]
    vectors: Vectors
    words: list[frozenset[str]]
    signatures: list[Signature]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stream: shares of all lookups. `ever_false`: the true errors passed the bound at some moment."""

    hits: float
    hits_second_half: float
    wrong: float
    wrong_of_served: float
    worst_1000: float
    first_hit_at: int
    audited: float
    bound: float
    ever_false: bool
    over_limit: bool


class Stream:
    """Entries in the order of their coming, and the neighbours of a shard among them."""

    def __init__(self, queries: Queries, labels: Sequence[str]) -> None:
        self._queries = queries
        self._labels = labels
        self._vectors = np.empty_like(queries.vectors)
        self.lines: list[int] = []

    def add(self, lines: Sequence[int]) -> None:
        self._vectors[len(self.lines) : len(self.lines) + len(lines)] = self._queries.vectors[list(lines)]
        self.lines += lines

    def vectors(self) -> Vectors:
        return self._vectors[: len(self.lines)]

    def nearest(self, shard: Sequence[int]) -> list[Found | None]:
        if len(self.lines) < NEIGHBOURS:
            return [None] * len(shard)
        cosines = self._queries.vectors[list(shard)] @ self.vectors().T
        places = np.argpartition(-cosines, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
        return [self._found(line, cosines[row], places[row]) for row, line in enumerate(shard)]

    def _found(self, line: int, cosines: Vectors, places: Order) -> Found:
        ordered = places[np.argsort(-cosines[places])]
        entries = [self.lines[place] for place in ordered]
        own = self._queries.words[line]
        return Found(
            entries=np.array(entries),
            answers=[self._labels[entry] for entry in entries],
            cosines=cosines[ordered].astype(np.float64),
            overlaps=np.array([overlap(own, self._queries.words[entry]) for entry in entries]),
            allowed=np.array([self._queries.signatures[entry] == self._queries.signatures[line] for entry in entries]),
            word_count=len(own),
        )


def read(folder: Path) -> Queries:
    """BANKING77's two files with vectors."""
    rows: list[tuple[str, str]] = []
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows += [(row["text"], row["category"]) for row in csv.DictReader(file)]
    texts = [text for text, _ in rows]
    vectors = OnnxEmbedder(EMBEDDER).embed(texts)
    return Queries(
        texts, [label for _, label in rows], vectors, [words(t) for t in texts], [signature(t) for t in texts]
    )


def with_pilot(order: Order, *, seed: int) -> Order:
    """The order with the pilot's lines in front, drawn uniformly."""
    drawn = np.random.default_rng(seed).permutation(len(order))[: pilot_size(len(order))]
    rest = np.ones(len(order), bool)
    rest[drawn] = False
    return np.concatenate((order[drawn], order[rest]))


def run(queries: Queries, order: Order, *, seed: int, limits: Limits, drift_at: int | None = None) -> Outcome:
    """The stream through a namespace; from `drift_at` lookups on, the engine answers half of the labels otherwise."""
    labels = list(queries.labels)
    policy, stream = Policy.begin(1, limits), Stream(queries, labels)
    model: Model | None = None
    samples: list[Judged] = []
    secret = seed.to_bytes(8)
    served = np.zeros(len(order), bool)
    wrong = np.zeros(len(order), bool)
    audited, ever_false, over_limit, wrong_so_far = 0, False, False, 0
    for start in range(0, len(order), SHARD):
        shard = order[start : start + SHARD].tolist()
        if drift_at is not None and start >= drift_at:
            for line in shard:
                labels[line] = _drifted(queries.labels[line])
        found = stream.nearest(shard)
        lookups = [
            Query(coin(secret, str(line).encode()), queries.vectors[line], one)
            for line, one in zip(shard, found, strict=True)
        ]
        ran: list[int] = []
        rows: list[Judged] = []
        policy, decisions = decide(policy, model, lookups)
        for at, decided in enumerate(decisions):
            line = shard[at]
            if decided.served:
                served[start + at] = True
                wrong[start + at] = decided.answer != labels[line]
                continue
            ran.append(line)
            if decided.features:
                rows.append(_judged(decided, lookups[at].coin, labels[line]))
        wrong_so_far += int(wrong[start : start + len(shard)].sum())
        audited += sum(one.audited for one in rows)
        version = policy.version
        policy = judge(policy, rows)
        samples = samples + rows if policy.version == version else []
        stream.add(ran)
        if policy.version == version:
            ever_false |= wrong_so_far > policy.audit.bound()
            over_limit |= wrong_so_far > limits.error * policy.lookups
        if policy.version != version:
            wrong_so_far = 0
        if is_fit_due(policy):
            model = fit(policy, samples, stream.vectors(), [labels[line] for line in stream.lines])
            policy = adopt(policy, model)
    return _outcome(served, wrong, audited, policy.bounds()[0], ever_false=ever_false, over_limit=over_limit)


def _judged(decided: Decided, coin: float, label: str) -> Judged:
    return Judged(
        features=decided.features,
        agreed=decided.answer == label,
        wished=decided.wished,
        audited=decided.audited,
        in_shadow=decided.in_shadow,
        coin=coin,
        rate=decided.rate,
    )


def run_cosine(queries: Queries, order: Order, *, least: float) -> Outcome:
    """The nearest entry's answer wherever its cosine is at least this."""
    stream = Stream(queries, queries.labels)
    served = np.zeros(len(order), bool)
    wrong = np.zeros(len(order), bool)
    for start in range(0, len(order), SHARD):
        shard = order[start : start + SHARD].tolist()
        ran = []
        for at, (line, found) in enumerate(zip(shard, stream.nearest(shard), strict=True)):
            if found is not None and found.cosines[0] >= least:
                served[start + at] = True
                wrong[start + at] = found.answers[0] != queries.labels[line]
            else:
                ran.append(line)
        stream.add(ran)
    return _outcome(served, wrong, 0, 1.0, ever_false=False, over_limit=False)


def _outcome(
    served: NDArray[np.bool_],
    wrong: NDArray[np.bool_],
    audited: int,
    bound: float,
    *,
    ever_false: bool,
    over_limit: bool,
) -> Outcome:
    half = len(served) // 2
    window = np.convolve(wrong, np.ones(min(1000, len(wrong))), "valid").max() / min(1000, len(wrong))
    return Outcome(
        hits=float(served.mean()),
        hits_second_half=float(served[half:].mean()),
        wrong=float(wrong.mean()),
        wrong_of_served=float(wrong.sum() / max(1, served.sum())),
        worst_1000=float(window),
        first_hit_at=int(np.argmax(served)) if served.any() else len(served),
        audited=audited / len(served),
        bound=bound,
        ever_false=ever_false,
        over_limit=over_limit,
    )


def _drifted(label: str) -> str:
    return f"{label} (new)" if sum(label.encode()) % 2 else label


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--drifts", type=int, default=100)
    options = parser.parse_args()
    began = time.monotonic()
    queries = read(options.folder)
    print(f"{len(queries.texts):,} texts embedded at {len(queries.texts) / (time.monotonic() - began):.0f}/s")
    rows: dict[str, list[Outcome]] = {}
    with ProcessPoolExecutor(max_workers=os.cpu_count(), initializer=_share, initargs=(queries,)) as pool:
        work = {
            "certified at 1%": [("certified", seed, 0.01) for seed in range(options.orders)],
            "certified at 2%": [("certified", seed, 0.02) for seed in range(options.orders)],
            **{f"cosine {c:.2f}": [("cosine", seed, c) for seed in range(options.orders)] for c in (0.8, 0.9, 0.95)},
            "certified at 1%, sorted by text": [("sorted", seed, 0.01) for seed in range(options.orders)],
            "certified at 1%, drift in the middle": [("drift", seed, 0.01) for seed in range(options.drifts)],
        }
        for name, tasks in work.items():
            rows[name] = list(pool.map(_task, tasks))
            print(_line(name, rows[name]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {"commit": commit.stdout.strip(), "lines": len(queries.texts), "seconds": round(time.monotonic() - began)}
    found |= {"rows": {name: [asdict(one) for one in many] for name, many in rows.items()}}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


_shared: list[Queries] = []


def _share(queries: Queries) -> None:
    _shared.append(queries)


def _task(asked: tuple[str, int, float]) -> Outcome:
    kind, seed, value = asked
    queries = _shared[0]
    order = np.random.default_rng(seed).permutation(len(queries.texts))
    if kind == "cosine":
        return run_cosine(queries, order, least=value)
    if kind == "drift":
        part = with_pilot(order[:6000], seed=seed)
        return run(queries, part, seed=seed, limits=Limits(error=value), drift_at=3000)
    if kind == "sorted":
        order = np.array(sorted(range(len(queries.texts)), key=lambda line: queries.texts[line]))
        order = with_pilot(order, seed=seed)
    return run(queries, order, seed=seed, limits=Limits(error=value))


def _line(name: str, many: Sequence[Outcome]) -> str:
    hits, second = ([getattr(one, field) for one in many] for field in ("hits", "hits_second_half"))
    return (
        f"{name:38} hits {statistics.median(hits):.1%} ({min(hits):.1%} to {max(hits):.1%}), second half "
        f"{statistics.median(second):.1%}, wrong {statistics.median(one.wrong for one in many):.2%} "
        f"(most {max(one.wrong for one in many):.2%}), audited {statistics.median(one.audited for one in many):.1%}, "
        f"worst 1,000 {max(one.worst_1000 for one in many):.1%}, "
        f"bound passed in {sum(one.ever_false for one in many)}, "
        f"over the limit in {sum(one.over_limit for one in many)} of {len(many)}"
    )


if __name__ == "__main__":
    main()
