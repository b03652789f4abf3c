"""Several shards decide before any of them is judged, and some batches end without their audits' answers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.cache_replay import Queries, Stream
from cache.certificate import coin
from cache.model import Model
from cache.namespace import Judged, Query, adopt, decide, fit, is_fit_due, judge
from cache.policy import Limits, Policy

LOOKUPS, SHARD, CLUSTERS, DRIFT_AT = 3_200, 64, 12, 1_900
WORKERS = 6
CANCELLED = 0.1  # of the shards: their audits never have an answer
STREAMS = 5


@dataclass(frozen=True)
class _Out:
    """A shard whose jobs are with the engine."""

    version: int
    rows: list[Judged]
    lines: list[int]
    served: int
    wrong: int
    cancelled: bool


def _queries(seed: int) -> Queries:
    """Twelve clusters with a label each; half of the labels change at DRIFT_AT, which nobody is told."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((CLUSTERS, 24))
    of = random.integers(CLUSTERS, size=LOOKUPS)
    vectors = centres[of] + 0.6 * random.standard_normal((LOOKUPS, 24))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = [
        f"label {cluster}" + (" new" if at >= DRIFT_AT and cluster % 2 else "")
        for at, cluster in enumerate(of.tolist())
    ]
    texts = [f"text {number}" for number in range(LOOKUPS)]
    return Queries(texts, labels, vectors, [frozenset(text.split()) for text in texts], [((),)] * LOOKUPS)


class _Workers:
    """Shards in flight at once; what is settled is checked against the bound after each judgement."""

    def __init__(self, seed: int) -> None:
        self.queries = _queries(seed)
        self.stream = Stream(self.queries, self.queries.labels)
        self.random = np.random.default_rng(seed + 100)
        self.secret = seed.to_bytes(8)
        self.policy = Policy.begin(1, Limits())
        self.model: Model | None = None
        self.samples: list[Judged] = []
        self.out: deque[_Out] = deque()
        self.served = self.wrong = self.settled_wrong = 0
        self.is_false = self.is_over = False

    def run(self) -> None:
        for start in range(0, LOOKUPS, SHARD):
            self._decide(list(range(start, start + SHARD)))
            if len(self.out) == WORKERS:
                self._settle()
        while self.out:
            self._settle()

    def _decide(self, lines: list[int]) -> None:
        coins = [coin(self.secret, str(line).encode()) for line in lines]
        found = self.stream.nearest(lines)
        asked = [Query(c, self.queries.vectors[line], one) for line, c, one in zip(lines, coins, found, strict=True)]
        mine = [shard for shard in self.out if shard.version == self.policy.version]
        unsettled = sum(shard.served for shard in mine if any(row.audited for row in shard.rows))
        self.policy, decisions = decide(self.policy, self.model, asked, unsettled=unsettled)
        rows, ran, served, wrong = [], [], 0, 0
        for line, drawn, one in zip(lines, coins, decisions, strict=True):
            agreed = one.answer == self.queries.labels[line]
            served += one.served
            wrong += one.served and not agreed
            if not one.served:
                ran.append(line)
            if not one.served and one.features:
                rows.append(Judged(one.features, agreed, one.wished, one.audited, one.in_shadow, drawn, one.rate))
        cancelled = bool(self.random.random() < CANCELLED)
        self.out.append(_Out(self.policy.version, rows, ran, served, wrong, cancelled))
        self.served += served
        self.wrong += wrong
        self.is_over |= self.wrong > 0.01 * self.policy.lookups and self.policy.version == 1

    def _settle(self) -> None:
        shard = self.out.popleft()
        if not shard.cancelled:
            self.stream.add(shard.lines)
        if shard.version != self.policy.version:
            return
        self.settled_wrong += shard.wrong
        rows, audit = shard.rows, self.policy.audit
        if shard.cancelled:
            for row in rows:
                audit = audit.with_errors(1, row.rate) if row.audited else audit
            rows = []
        after = judge(replace(self.policy, audit=audit), rows)
        for row in rows:
            audit = audit.with_errors(1, row.rate) if row.audited and not row.agreed else audit
        self.is_false |= self.settled_wrong > audit.bound()
        self.samples += rows
        if after.version != self.policy.version:
            self.samples, self.settled_wrong = [], 0
        elif is_fit_due(after):
            answers = [self.queries.labels[line] for line in self.stream.lines]
            self.model = fit(after, self.samples, self.stream.vectors(), answers)
            after = adopt(after, self.model)
        self.policy = after


def test_the_bound_and_the_sentence_hold_with_six_shards_in_flight_a_drift_and_cancelled_batches() -> None:
    """Both may fail in 5% of streams by right; of these five at most in one."""
    streams = [_Workers(seed) for seed in range(STREAMS)]
    for stream in streams:
        stream.run()
    assert sum(stream.served > 15 for stream in streams) >= 3, "there was something to be wrong about"
    assert sum(stream.is_false for stream in streams) <= 1
    assert sum(stream.is_over for stream in streams) <= 1
