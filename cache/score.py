"""How likely the neighbours' answer is the engine's: a logistic score over what the neighbours look like.

Fitted to lookups whose answer the engine has given. It is a guess: what it lets through is bounded by the
certificate, whatever the score is worth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]

NEIGHBOURS: Final = 24
FEATURES: Final = 14
MOST_ANSWERS: Final = 500  # different answers of a namespace up to which they are learned from the vectors
_CLOSENESS: Final = 0.05  # a neighbour's vote falls by e for each such step of cosine below the nearest
_DIRECTIONS: Final = 700  # 500 rank a point worse, 1,000 gave no more hits and take twice as long
_SHARPNESS: Final = 2.0  # of the kernel, in 1 / (mean distance of entries); 3 is no better
_RIDGE: Final = 0.2
_ROWS_AT_ONCE: Final = 2048
_SHRINKAGE: Final = 1.0
_STEPS: Final = 12
_LEAST_SCALE: Final = 1e-6
_FARTHEST: Final = 4.0  # standard deviations of a feature beyond which it counts no further
_WORDS = re.compile(r"\w+")


def words(payload: str) -> frozenset[str]:
    """The words of a payload, for the lexical features."""
    return frozenset(_WORDS.findall(payload.lower()))


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest entries of one lookup, nearest first: cosines, their answers' numbers, words shared with it (0 to 1).

    `word_count` is the lookup's own.
    """

    cosines: Floats
    answers: NDArray[np.int64]
    overlaps: Floats
    word_count: int


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Words in both by words in either (Jaccard)."""
    return len(one & other) / max(1, len(one | other))


def candidate(found: Neighbours, likely: Floats | None) -> tuple[int, list[float]]:
    """The answer that the neighbours vote for, and the FEATURES of that vote; `likely` has a value for each answer."""
    cosines, answers = found.cosines, found.answers
    votes = np.exp((cosines - cosines[0]) / _CLOSENESS)
    votes /= votes.sum()
    present, which = np.unique(answers, return_inverse=True)
    shares = np.bincount(which, weights=votes)
    answer = int(present[np.argmax(shares + (0.0 if likely is None else likely[present]))])
    same = answers == answer
    best, other = float(cosines[same][0]), float(cosines[~same][0]) if not same.all() else 0.0
    near, far = float(found.overlaps[same].max()), float(found.overlaps[~same].max()) if not same.all() else 0.0
    own = [float(cosines[0]), best, float(votes[same].sum()), best - other, float(same[:5].mean()), float(same.mean())]
    lexical = [float(found.overlaps[same][0]), near - far, near]
    closest = cosines[same][:3]
    shape = [float(closest.sum()) / 3, float(np.log1p(found.word_count))]
    return answer, [*own, *lexical, *shape, *_learned(answer, likely)]


def _learned(answer: int, likely: Floats | None) -> list[float]:
    if likely is None:
        return [0.0, 0.0, 0.0]
    others = np.delete(likely, answer)
    margin = float(likely[answer] - (others.max() if len(others) else 0.0))
    return [float(likely[answer]), margin, float(margin >= 0)]


@dataclass(frozen=True, slots=True)
class AnswerMap:
    """Values of answers by kernel ridge regression: `directions` draw the kernel's random features.

    (dimensions, _DIRECTIONS) and (2 * _DIRECTIONS, answers).
    """

    directions: Vectors
    coefficients: Vectors

    def values(self, vectors: Vectors) -> Floats:
        """For each vector a value for each answer, some 1 for the right one."""
        return np.asarray(_waves(vectors, self.directions) @ self.coefficients, dtype=np.float64)


def learn_answers(vectors: Vectors, answers: NDArray[np.int64], count: int) -> AnswerMap | None:
    """The map of `count` answers, learned from entries; None: there are too many answers.

    A Gaussian kernel by random Fourier features (Rahimi and Recht 2007), as wide as the entries lie apart: beside a
    linear map BANKING77's labels lose a third of their errors.
    """
    if not 1 < count <= MOST_ANSWERS:
        return None
    apart = 1 - float((vectors.mean(axis=0, dtype=np.float64) ** 2).sum())  # mean of 1 - cosine over all pairs
    drawn = np.random.RandomState(0).standard_normal((vectors.shape[1], _DIRECTIONS))
    directions = np.asarray(drawn * np.sqrt(_SHARPNESS / max(apart, 0.01)), dtype=np.float32)
    square = _RIDGE * np.eye(2 * _DIRECTIONS)
    sums = np.zeros((count, 2 * _DIRECTIONS))
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        waves = _waves(vectors[start : start + _ROWS_AT_ONCE], directions)
        square += waves.T @ waves
        ordered = np.argsort(answers[start : start + _ROWS_AT_ONCE], kind="stable")
        present, begins = np.unique(answers[start : start + _ROWS_AT_ONCE][ordered], return_index=True)
        sums[present] += np.add.reduceat(waves[ordered], begins, axis=0)
    return AnswerMap(directions, np.asarray(np.linalg.solve(square, sums.T), dtype=np.float32))


def _waves(vectors: Vectors, directions: Vectors) -> Vectors:
    turned = vectors @ directions
    return np.concatenate((np.cos(turned), np.sin(turned)), axis=1) * np.float32(1 / np.sqrt(_DIRECTIONS))


@dataclass(frozen=True, slots=True)
class Scorer:
    """A fitted score: log odds that the neighbours' answer is the engine's."""

    mean: Floats
    scale: Floats
    weights: Floats  # of 1, the features and their squares

    def score(self, features: Sequence[Sequence[float]] | Floats) -> Floats:
        """One log odds for each row of features."""
        rows = np.asarray(features, dtype=np.float64).reshape(-1, FEATURES)
        return np.asarray(_terms(rows, self.mean, self.scale) @ self.weights, dtype=np.float64)


def fit_scorer(features: Floats, agreed: NDArray[np.bool_]) -> Scorer:
    """Logistic regression by Newton's method.

    Rows have no weights: whether one came to be seen hangs on its features and its coin, not on whether it agreed.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > _LEAST_SCALE, scale, np.inf)  # what never varied says nothing
    rows = _terms(features, mean, scale)
    shrink = _SHRINKAGE * np.eye(rows.shape[1])
    shrink[0, 0] = 1e-6
    found = np.zeros(rows.shape[1])
    for _ in range(_STEPS):
        likely = 1 / (1 + np.exp(-np.clip(rows @ found, -30, 30)))
        curvature = (rows * (likely * (1 - likely))[:, None]).T @ rows + shrink
        found = found + np.linalg.solve(curvature, rows.T @ (agreed - likely) - shrink @ found)
    return Scorer(mean, scale, found)


def _terms(features: Floats, mean: Floats, scale: Floats) -> Floats:
    scaled = np.clip((features - mean) / scale, -_FARTHEST, _FARTHEST)
    return np.column_stack((np.ones(len(features)), scaled, scaled**2))


def cross_fitted(features: Floats, agreed: NDArray[np.bool_], folds: NDArray[np.bool_]) -> Floats:
    """Scores of all rows, each by a fit to the other fold: what a threshold is chosen by was not fitted to itself."""
    scores = np.zeros(len(features))
    for fold in (False, True):
        mine = folds == fold
        if mine.any() and (~mine).any():
            scores[mine] = fit_scorer(features[~mine], agreed[~mine]).score(features[mine])
    return scores
