"""One namespace at work: payloads that may answer for each other, and what is known of how well they do.

It keeps no entries and asks no index: its owner finds the neighbours, runs the engine, and brings the answers back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.policy import FIT_SAMPLES, Decision, Limits, Policy, Samples, decide
from cache.score import Floats, Neighbours, Scorer, Vectors, candidate, learn_answers

RETHINK_LOOKUPS = 256  # how often the threshold is chosen anew between fits


@dataclass(frozen=True, slots=True)
class Found:
    """The nearest entries of a lookup, nearest first; `allowed` are those that the guards let answer for it."""

    entries: NDArray[np.int64]
    answers: Sequence[str]
    cosines: Floats
    overlaps: Floats
    allowed: NDArray[np.bool_]
    word_count: int


@dataclass(frozen=True, slots=True)
class Query:
    """One lookup: its audit coin, its vector, and its neighbours, if there are enough."""

    coin: float
    vector: Vectors
    found: Found | None


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided of a lookup, and what judging it later takes. `entry` is what would be or is served."""

    decision: Decision
    answer: str | None
    entry: int | None
    features: tuple[float, ...]
    rate: float
    in_shadow: bool
    fold: bool


class Namespace:
    """The policy of one namespace with its score and its judged lookups."""

    def __init__(self, limits: Limits, *, version: int = 1) -> None:
        self.policy = Policy.begin(version, limits)
        self._scorer: Scorer | None = None
        self._scores: Floats | None = None
        self._fitted: Samples | None = None
        self._likely: Floats | None = None
        self._answers: dict[str, int] = {}
        self._learned = 0
        self._samples: deque[tuple[tuple[float, ...], bool, float, bool]] = deque(maxlen=FIT_SAMPLES)
        self._rethink_at = 0

    def decide(self, queries: Sequence[Query]) -> list[Decided]:
        """One decision a lookup, all under one state; the owner serves, or runs and brings back to `judge`."""
        self._rethink()
        candidates = [self._candidate(query) for query in queries]
        scores = np.full(len(queries), -np.inf)
        known = [at for at, found in enumerate(candidates) if found is not None]
        if self._scorer is not None and known:
            scores[known] = self._scorer.score([found[2] for found in candidates if found is not None])
        servable = [found is not None and found[1] is not None for found in candidates]
        coins = np.array([query.coin for query in queries])
        policy, rate = self.policy, self.policy.rate
        decisions = decide(policy, scores, coins, servable)
        self.policy = policy.after_lookups(
            len(queries),
            decided=sum(one.is_wished for one in decisions),
            served=sum(one.is_served for one in decisions),
        )
        return [
            Decided(
                decision=decision,
                answer=None if found is None else found[0],
                entry=None if found is None else found[1],
                features=() if found is None else found[2],
                rate=rate,
                in_shadow=not policy.is_serving,
                fold=bool(int(query.coin * 2**40) & 1),
            )
            for query, decision, found in zip(queries, decisions, candidates, strict=True)
        ]

    def judge(self, decided: Decided, answer: str) -> None:
        """The engine's answer to a lookup that was not served."""
        if decided.answer is None:
            return
        agreed = decided.answer == answer
        decision = decided.decision
        if decision.is_wished and decided.in_shadow:
            self.policy = self.policy.after_shadow(agreed=agreed)
        if decision.audited:
            self.policy = self.policy.after_audit(agreed=agreed, rate=decided.rate)
            if not agreed:
                self._rethink_at = 0
        weight = 1 / decided.rate if decision.audited else 1.0
        self._samples.append((decided.features, agreed, weight, decided.fold))

    @property
    def is_fit_due(self) -> bool:
        """Whether `fit` should be called with all entries."""
        return self.policy.lookups >= self.policy.next_fit and len(self._samples) > 0

    def fit(self, vectors: Vectors, answers: Sequence[str]) -> None:
        """Learn from the entries (a vector and an answer each) and the judged lookups; chooses the threshold anew."""
        numbers = np.array([self._answers.setdefault(answer, len(self._answers)) for answer in answers])
        self._likely = learn_answers(vectors, numbers, len(self._answers))
        self._learned = len(self._answers)
        features, agreed, weights, folds = zip(*self._samples, strict=True)
        self._fitted = Samples(np.array(features), np.array(agreed), np.array(weights), np.array(folds))
        self.policy, self._scorer, self._scores = self.policy.fitted(self._fitted)
        self._rethink_at = self.policy.lookups + RETHINK_LOOKUPS

    def _rethink(self) -> None:
        if self._fitted is not None and self._scores is not None and self.policy.lookups >= self._rethink_at:
            self.policy = self.policy.with_threshold(self._fitted, self._scores)
            self._rethink_at = self.policy.lookups + RETHINK_LOOKUPS

    def _candidate(self, query: Query) -> tuple[str, int | None, tuple[float, ...]] | None:
        """(The neighbours' answer, the nearest allowed entry that has it, features)."""
        found = query.found
        if found is None:
            return None
        numbers = np.array([self._answers.setdefault(answer, len(self._answers)) for answer in found.answers])
        answer, features = candidate(
            Neighbours(found.cosines, numbers, found.overlaps, found.word_count), self._values(query.vector)
        )
        same = np.flatnonzero((numbers == answer) & found.allowed)
        text = found.answers[int(np.flatnonzero(numbers == answer)[0])]
        return text, int(found.entries[same[0]]) if len(same) else None, tuple(features)

    def _values(self, vector: Vectors) -> Floats | None:
        """A value for each answer seen; those that came after the last fit have none yet."""
        if self._likely is None:
            return None
        values = np.zeros(max(len(self._answers), self._learned))
        values[: self._learned] = vector.astype(np.float64) @ self._likely
        return values
