"""One namespace at work: payloads that may answer for each other, and what is known of how well they do.

Pure functions over a state that the owner keeps: it finds the neighbours, runs the engine, keeps judged lookups and
entries, stores what is returned here, and lets one process at a time change the policy. Only `fit` is slow; it may
run apart, on a policy that has moved on meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache.control import rethought
from cache.model import FIT_SAMPLES, Model, Samples, learned
from cache.policy import Policy
from cache.score import Floats, Neighbours, Vectors, candidate

_REFIT_GROWTH: Final = 1.2


@dataclass(frozen=True, slots=True)
class Found:
    """The nearest entries of a lookup, nearest first; `allowed` are those that may answer for it.

    Not allowed are those whose payload a guard keeps apart, and those whose answer is free text.
    """

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
    """What becomes of one lookup: served with `answer` of `entry`, or run; what judging it later takes.

    `wished`: score and guards would serve it. Without neighbours there is no candidate: `answer` is None and
    `features` empty.
    """

    wished: bool
    served: bool
    audited: bool
    in_shadow: bool
    answer: str | None
    entry: int | None
    similarity: float | None
    features: tuple[float, ...]
    rate: float


@dataclass(frozen=True, slots=True)
class Judged:
    """A lookup that had a candidate and was run; `agreed`: the candidate is the engine's answer."""

    features: tuple[float, ...]
    agreed: bool
    wished: bool
    audited: bool
    in_shadow: bool
    coin: float
    rate: float


def decide(
    policy: Policy, model: Model | None, queries: Sequence[Query], *, unsettled: int = 0
) -> tuple[Policy, list[Decided]]:
    """One decision a lookup, all under one state. They belong to the version of the policy that is returned.

    `unsettled` answers were served beside audits that are not yet judged, by shards that run at the same time.

    A job is decided once: its coin is the same at every try, so a second decision would count one coin twice.
    """
    model = model if model is not None and model.version == policy.version else None
    if model is not None and policy.lookups >= policy.rethink_at:
        policy = rethought(policy, model)
    numbers = {} if model is None else {answer: number for number, answer in enumerate(model.answers)}
    values = _values(model, queries)
    candidates = [_candidate(query, numbers, row) for query, row in zip(queries, values, strict=True)]
    wished = _wished(policy, model, candidates, unsettled=unsettled)
    is_serving, rate = policy.is_serving, policy.rate
    decisions = []
    for query, found, wish in zip(queries, candidates, wished, strict=True):
        audited = wish and is_serving and query.coin < rate
        decisions.append(
            Decided(
                wished=wish,
                served=wish and is_serving and not audited,
                audited=audited,
                in_shadow=not is_serving,
                answer=found.answer,
                entry=found.entry,
                similarity=found.similarity,
                features=found.features,
                rate=rate,
            )
        )
    served = sum(one.served for one in decisions)
    decided = sum(wished) if is_serving else 0
    return policy.after_lookups(len(queries), decided=decided, served=served), decisions


def judge(policy: Policy, judged: Sequence[Judged]) -> Policy:
    """The engine has answered these lookups, which were decided under this version; in any order, in any parts.

    Only the moment of an alarm, which ends the version, may depend on the parts. An audited lookup that the engine
    gave no comparable answer is not `agreed`: to leave it out would hide an error.
    """
    audits = [one for one in judged if one.audited]
    shadow = [one for one in judged if one.wished and one.in_shadow]
    errors = sorted(one.rate for one in audits if not one.agreed)
    audit = policy.audit
    for rate in errors:
        audit = audit.with_errors(1, rate)
    after = replace(
        policy,
        audit=audit,
        judged=policy.judged + len(judged),
        decided=policy.decided + len(shadow),
        shadow_errors=policy.shadow_errors + sum(not one.agreed for one in shadow),
        alarm_audits=policy.alarm_audits + len(audits),
        alarm_errors=policy.alarm_errors + len(errors),
        rethink_at=0 if errors else policy.rethink_at,
    )
    return after.next_version() if after.is_alarmed else after


def is_fit_due(policy: Policy) -> bool:
    """Whether `fit` should be called with this version's newest judged lookups and all entries."""
    return policy.lookups >= policy.next_fit and policy.judged > 0


def fit(policy: Policy, samples: Sequence[Judged], vectors: Vectors, answers: Sequence[str]) -> Model:
    """Learn from this version's judged lookups, oldest first, and the entries: a vector and an answer each.

    A served lookup is never judged, an audited one with probability `rate`: it stands for 1 / rate.
    """
    kept = [one for one in samples if one.features][-FIT_SAMPLES:]
    rows = Samples(
        features=np.array([one.features for one in kept], dtype=np.float64),
        agreed=np.array([one.agreed for one in kept], dtype=np.bool_),
        weights=np.array([1 / one.rate if one.audited else 1.0 for one in kept], dtype=np.float64),
        folds=np.array([int(one.coin * 2**40) & 1 for one in kept], dtype=np.bool_),
    )
    return learned(policy.version, rows, vectors, answers)


def adopt(policy: Policy, model: Model) -> Policy:
    """The policy with the threshold that the model gives it now; unchanged if the model is of another version."""
    if model.version != policy.version:
        return policy
    next_fit = math.ceil(policy.lookups * _REFIT_GROWTH)
    fitted = replace(policy, fits=policy.fits + 1, next_fit=next_fit, alarm_audits=0, alarm_errors=0)
    return rethought(fitted, model)


@dataclass(frozen=True, slots=True)
class _Candidate:
    answer: str | None = None
    entry: int | None = None
    similarity: float | None = None
    features: tuple[float, ...] = ()


def _candidate(query: Query, numbers: dict[str, int], values: Floats | None) -> _Candidate:
    """The answer that the neighbours vote for, and the nearest allowed entry that has it."""
    found = query.found
    if found is None:
        return _Candidate()
    own = dict(numbers) if any(answer not in numbers for answer in found.answers) else numbers
    answers = np.array([own.setdefault(answer, len(own)) for answer in found.answers])
    if values is not None:
        values = np.concatenate((values, np.zeros(len(own) - len(values))))
    answer, features = candidate(Neighbours(found.cosines, answers, found.overlaps, found.word_count), values)
    same = np.flatnonzero(answers == answer)
    text = found.answers[int(same[0])]
    allowed = same[found.allowed[same]]
    if not len(allowed):
        return _Candidate(text, features=tuple(features))
    nearest = int(allowed[0])
    return _Candidate(text, int(found.entries[nearest]), float(found.cosines[nearest]), tuple(features))


def _values(model: Model | None, queries: Sequence[Query]) -> list[Floats] | list[None]:
    """For each query a value for each answer that the model knows."""
    if model is None or model.likely is None or not queries:
        return [None] * len(queries)
    return list(model.likely.values(np.stack([query.vector for query in queries])))


def _wished(policy: Policy, model: Model | None, candidates: Sequence[_Candidate], *, unsettled: int) -> list[bool]:
    """Which pass the threshold; of too many those with the highest scores."""
    if model is None or policy.threshold is None:
        return [False] * len(candidates)
    able = [at for at, found in enumerate(candidates) if found.entry is not None]
    scores = model.scorer.score([candidates[at].features for at in able])
    chosen = [at for at in np.argsort(-scores, kind="stable").tolist() if scores[at] >= policy.threshold]
    best = {able[at] for at in chosen[: policy.most_wished(len(candidates), unsettled=unsettled)]}
    return [at in best for at in range(len(candidates))]
