"""One stream of labelled queries through the semantic cache, as its owner would lead it, with exact neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cache.certificate import coin
from cache.guards import Signature
from cache.model import Model
from cache.namespace import Decided, Found, Judged, Query, adopt, decide, fit, is_fit_due, judge
from cache.policy import Limits, Policy
from cache.score import NEIGHBOURS, Vectors, overlap

SHARD = 64
Order = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Queries:
    """Labelled queries with their vectors; `embed_s` is how long those took."""

    texts: list[str]
    labels: list[str]
    vectors: Vectors
    words: list[frozenset[str]]
    signatures: list[Signature]
    embed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stream: shares of all lookups. `ever_false`: true errors passed the bound at some moment.

    `ever_over_lookups`: they passed the first limit at some moment, whatever was stated then; `ever_over`: that, or the
    second one was passed while the policy stated that it was not.
    """

    hits: float
    hits_second_half: float
    wrong: float
    wrong_second_half: float
    wrong_of_served: float
    worst_1000: float
    first_hit_at: int
    audited: float = 0.0
    bound: float = 1.0
    bound_of_decided: float = 1.0
    versions: int = 1
    ever_false: bool = False
    ever_over: bool = False
    ever_over_lookups: bool = False


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


@dataclass
class Replay:
    """One stream through a namespace: what its owner keeps, and what came of each lookup."""

    queries: Queries
    limits: Limits
    seed: int
    size: int
    labels: list[str] = field(init=False)
    policy: Policy = field(init=False)
    stream: Stream = field(init=False)
    model: Model | None = None
    samples: list[Judged] = field(default_factory=list)
    served: NDArray[np.bool_] = field(init=False)
    wrong: NDArray[np.bool_] = field(init=False)
    audited: int = 0
    wrong_in_version: int = 0
    ever_false: bool = False
    ever_over: bool = False
    ever_over_lookups: bool = False

    def __post_init__(self) -> None:
        self.labels = list(self.queries.labels)
        self.policy = Policy.begin(1, self.limits)
        self.stream = Stream(self.queries, self.labels)
        self.served, self.wrong = np.zeros(self.size, bool), np.zeros(self.size, bool)

    def shard(self, start: int, lines: list[int]) -> None:
        """Decide, run what is not served, judge, and fit when it is due."""
        secret = self.seed.to_bytes(8)
        coins = [coin(secret, str(line).encode()) for line in lines]
        found = self.stream.nearest(lines)
        lookups = [self.query(line, c, one) for line, c, one in zip(lines, coins, found, strict=True)]
        self.policy, decisions = decide(self.policy, self.model, lookups)
        ran: list[int] = []
        rows: list[Judged] = []
        for at, (line, decided) in enumerate(zip(lines, decisions, strict=True)):
            if decided.served:
                self.served[start + at] = True
                self.wrong[start + at] = decided.answer != self.labels[line]
                continue
            ran.append(line)
            if decided.features:
                rows.append(_judged(decided, coins[at], self.labels[line]))
        self.stream.add(ran)
        self.wrong_in_version += int(self.wrong[start : start + len(lines)].sum())
        self._judge(rows)

    def query(self, line: int, drawn: float, found: Found | None) -> Query:
        """The lookup of a line."""
        return Query(drawn, self.queries.vectors[line], found)

    def _judge(self, rows: list[Judged]) -> None:
        self.audited += sum(one.audited for one in rows)
        before, after = self.policy, judge(self.policy, rows)
        audit = before.audit  # of the version that decided, also where an alarm ends it
        for one in rows:
            audit = audit.with_errors(1, one.rate) if one.audited and not one.agreed else audit
        shadow = [one for one in rows if one.wished and one.in_shadow]
        stated = replace(
            before,
            audit=audit,
            decided=before.decided + len(shadow),
            shadow_errors=before.shadow_errors + sum(not one.agreed for one in shadow),
        )
        self.ever_false |= self.wrong_in_version > audit.bound()
        is_over = self.wrong_in_version > stated.allowed(stated.lookups, stated.decided)
        self.ever_over_lookups |= self.wrong_in_version > self.limits.error * stated.lookups
        self.ever_over |= self.ever_over_lookups or (stated.is_serving and is_over)
        self.policy = after
        if after.version != before.version:
            self.samples, self.wrong_in_version = [], 0
            return
        self.samples += rows
        if is_fit_due(after):
            self.model = fit(
                after, self.samples, self.stream.vectors(), [self.labels[line] for line in self.stream.lines]
            )
            self.policy = adopt(after, self.model)

    def outcome(self) -> Outcome:
        """After the last shard."""
        bound, of_decided = self.policy.bounds()
        return replace(
            _outcome(self.served, self.wrong),
            audited=self.audited / self.size,
            bound=bound,
            bound_of_decided=of_decided,
            versions=self.policy.version,
            ever_false=self.ever_false,
            ever_over=self.ever_over,
            ever_over_lookups=self.ever_over_lookups,
        )


def run(queries: Queries, order: Order, *, seed: int, limits: Limits, drift_at: int | None = None) -> Outcome:
    """The stream through a namespace; from `drift_at` lookups on, the engine answers half of the labels otherwise."""
    replay = Replay(queries, limits, seed, len(order))
    for start in range(0, len(order), SHARD):
        lines = order[start : start + SHARD].tolist()
        if drift_at is not None and start >= drift_at:
            for line in lines:
                replay.labels[line] = _drifted(queries.labels[line])
        replay.shard(start, lines)
    return replay.outcome()


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
    return _outcome(served, wrong)


def _outcome(served: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> Outcome:
    half, width = len(served) // 2, min(1000, len(wrong))
    return Outcome(
        hits=float(served.mean()),
        hits_second_half=float(served[half:].mean()),
        wrong=float(wrong.mean()),
        wrong_second_half=float(wrong[half:].mean()),
        wrong_of_served=float(wrong.sum() / max(1, served.sum())),
        worst_1000=float(np.convolve(wrong, np.ones(width), "valid").max() / width),
        first_hit_at=int(np.argmax(served)) if served.any() else len(served),
    )


def _drifted(label: str) -> str:
    return f"{label} (new)" if sum(label.encode()) % 2 else label
