"""What a fit has learned, apart from the state that it serves under: heavy, replaced as a whole, never changed.

Its bytes are msgpack with plain arrays: reading them runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cache.score import AnswerMap, Floats, Scorer, Vectors, cross_fitted, fit_scorer, learn_answers

_KINDS: Final[dict[type, str]] = {np.bool_: "?", np.float32: "<f4", np.float64: "<f8"}
FIT_SAMPLES: Final = 6_000  # the newest; older ones had fewer entries to look at


@dataclass(frozen=True, slots=True)
class Samples:
    """Lookups whose candidate the engine's answer has judged: one row each.

    `weights` are 1 / (probability that the engine ran it); `folds` halves them at random.
    """

    features: Floats
    agreed: NDArray[np.bool_]
    weights: Floats
    folds: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Model:
    """`answers` number the values of `likely`, a map from a vector to a value for each (None: not learned).

    `scores`, `agreed` and `weights` are of the samples it was fitted to, cross-fitted: thresholds are chosen by them.
    `version` is that of the policy whose samples these were.
    """

    version: int
    answers: tuple[str, ...]
    likely: AnswerMap | None
    scorer: Scorer
    scores: Floats
    agreed: NDArray[np.bool_]
    weights: Floats

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        arrays = {
            "mean": self.scorer.mean,
            "scale": self.scorer.scale,
            "scorer": self.scorer.weights,
            "scores": self.scores,
            "agreed": self.agreed,
            "weights": self.weights,
        }
        if self.likely is not None:
            arrays |= {"directions": self.likely.directions, "coefficients": self.likely.coefficients}
        return msgspec.msgpack.encode(_Stored(self.version, self.answers, {n: _packed(a) for n, a in arrays.items()}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Model:
        """The model that `to_bytes` wrote. Raises msgspec.DecodeError or ValueError for anything else."""
        stored = msgspec.msgpack.decode(data, type=_Stored)
        found = {name: _unpacked(array) for name, array in stored.arrays.items()}
        scorer = Scorer(found["mean"], found["scale"], found["scorer"])
        return cls(
            version=stored.version,
            answers=stored.answers,
            likely=AnswerMap(found["directions"], found["coefficients"]) if "directions" in found else None,
            scorer=scorer,
            scores=found["scores"],
            agreed=found["agreed"],
            weights=found["weights"],
        )


def learned(version: int, samples: Samples, vectors: Vectors, answers: Sequence[str]) -> Model:
    """Fitted to all entries (a vector and an answer each) and to the judged lookups."""
    known = tuple(dict.fromkeys(answers))
    numbers = {answer: number for number, answer in enumerate(known)}
    likely = learn_answers(vectors, np.array([numbers[answer] for answer in answers], np.int64), len(known))
    return Model(
        version=version,
        answers=known,
        likely=likely,
        scorer=fit_scorer(samples.features, samples.agreed),
        scores=cross_fitted(samples.features, samples.agreed, samples.folds),
        agreed=samples.agreed,
        weights=samples.weights,
    )


class _Array(msgspec.Struct, frozen=True):
    kind: str
    shape: tuple[int, ...]
    content: bytes


class _Stored(msgspec.Struct, frozen=True):
    version: int
    answers: tuple[str, ...]
    arrays: dict[str, _Array]


def _packed(array: NDArray[Any]) -> _Array:
    kind = _KINDS[array.dtype.type]
    return _Array(kind, array.shape, np.ascontiguousarray(array, dtype=kind).tobytes())


def _unpacked(array: _Array) -> NDArray[Any]:
    if array.kind not in _KINDS.values():
        raise ValueError(f"a model has no arrays of kind {array.kind!r}")
    found = np.frombuffer(array.content, dtype=array.kind).reshape(array.shape)
    return found.astype(found.dtype.newbyteorder("="))
