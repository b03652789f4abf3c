"""A namespace's states, and its functions over them: whatever the order, whoever the process, whatever the stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cache_replay import Queries, Replay, run
from cache.certificate import RATES, AtRate, Audit
from cache.model import Model
from cache.namespace import Judged, adopt, decide, fit, is_fit_due, judge
from cache.pilot import PILOT_LOOKUPS
from cache.policy import Limits, Policy
from cache.score import FEATURES

LOOKUPS = 3_000
CLUSTERS = 12


@pytest.fixture(scope="module")
def queries() -> Queries:
    """Twelve clusters, each with its label; a few percent lie between two."""
    random = np.random.default_rng(3)
    centres = random.standard_normal((CLUSTERS, 24))
    of = random.integers(CLUSTERS, size=LOOKUPS)
    vectors = centres[of] + 0.6 * random.standard_normal((LOOKUPS, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [f"text {number}" for number in range(LOOKUPS)]
    return Queries(
        texts,
        [f"label {cluster}" for cluster in of.tolist()],
        vectors.astype(np.float32),
        [frozenset(text.split()) for text in texts],
        [((),)] * LOOKUPS,
    )


@pytest.fixture(scope="module")
def replayed(queries: Queries) -> Replay:
    """A namespace after all of them."""
    replay = Replay(queries, Limits(), 1, LOOKUPS)
    for start in range(0, LOOKUPS, 64):
        replay.shard(start, list(range(start, min(start + 64, LOOKUPS))))
    return replay


def _judged(seed: int, count: int) -> list[Judged]:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        kind = int(random.integers(4))
        rows.append(
            Judged(
                features=tuple(random.random(FEATURES).tolist()),
                agreed=bool(random.random() < 0.8),
                wished=kind > 0,
                audited=kind == 1,
                in_shadow=kind > 1,
                coin=float(random.random()),
                rate=RATES[int(random.integers(3))],
            )
        )
    return rows


def _serving() -> Policy:
    audit = Audit(0.045, tuple(AtRate(rate, 300) for rate in RATES[:3]))
    return replace(Policy.begin(1, Limits()), audit=audit, lookups=2_000, served=900, expected_error=0.1, threshold=1.0)


@given(seed=st.integers(0, 10_000), count=st.integers(0, 40), cut=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_judgements_may_come_in_any_order_and_in_any_parts(seed: int, count: int, cut: int) -> None:
    rows = _judged(seed, count)
    shuffled = [rows[at] for at in np.random.default_rng(seed + 1).permutation(count)]
    once = judge(_serving(), rows)
    assert judge(_serving(), shuffled) == once
    if once.version == 1:
        first = judge(_serving(), shuffled[:cut])
        assert first.version == 2 or judge(first, shuffled[cut:]) == once


@given(seed=st.integers(0, 1_000))
@settings(max_examples=20, deadline=None)
def test_a_policy_is_the_same_after_its_text(seed: int) -> None:
    policy = judge(_serving(), _judged(seed, 30))
    assert Policy.decode(policy.encode()) == policy
    assert Policy.decode(policy.encode().replace('"version"', '"gone":[1],"version"', 1)) == policy


def test_a_model_is_the_same_after_its_bytes(replayed: Replay) -> None:
    model = replayed.model
    assert model is not None
    again = Model.from_bytes(model.to_bytes())
    assert again.to_bytes() == model.to_bytes()
    assert adopt(replayed.policy, again) == adopt(replayed.policy, model)
    with pytest.raises(ValueError, match="kind"):
        Model.from_bytes(model.to_bytes().replace(b"<f4", b"|O8"))


def test_a_version_serves_nothing_before_its_pilot_and_then_it_serves(replayed: Replay) -> None:
    policy = Policy.begin(1, Limits())
    assert not policy.is_serving
    assert policy.bounds() == (0.0, 0.0)
    assert policy.state()[0] == "pilot"
    assert not replayed.served[:PILOT_LOOKUPS].any()
    assert replayed.served[2_000:].mean() > 0.2
    assert replayed.wrong.mean() <= 0.01
    assert replayed.policy.state()[0] == "serving"


def test_audits_are_the_wished_lookups_whose_coin_is_below_the_rate(queries: Queries, replayed: Replay) -> None:
    found = replayed.stream.nearest(list(range(200)))
    for number in (0.0, 0.999):
        lookups = [replayed.query(line, number, one) for line, one in enumerate(found)]
        policy, decisions = decide(replayed.policy, replayed.model, lookups)
        wished = [one for one in decisions if one.wished]
        assert 20 < len(wished) <= replayed.policy.most_wished(200)
        assert all(one.audited is (number == 0.0) and one.served is (number > 0.5) for one in wished)
        assert policy.served - replayed.policy.served == sum(one.served for one in decisions)
        assert all(one.answer is not None and one.similarity is not None for one in wished)


def test_an_alarm_ends_the_version_and_the_next_is_cold(replayed: Replay) -> None:
    policy = replayed.policy
    wrong = Judged((0.0,) * FEATURES, False, True, True, False, 0.01, policy.rate)
    after = judge(policy, [wrong] * 30)
    assert (after.version, after.lookups, after.threshold) == (policy.version + 1, 0, None)
    assert after.audit.alpha < policy.audit.alpha / 10
    assert after.state()[0] == "pilot"
    assert not is_fit_due(after)
    assert replayed.model is not None
    assert adopt(after, replayed.model) == after


def test_few_samples_and_one_answer_still_fit() -> None:
    policy = Policy.begin(1, Limits())
    vectors = np.eye(8, dtype=np.float32)
    model = fit(policy, [*_judged(1, 3), replace(_judged(1, 1)[0], features=())], vectors, ["only"] * 8)
    assert model.likely is None
    assert adopt(policy, model).fits == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_sentence_stays_true_while_half_of_the_answers_change_in_the_middle(seed: int, queries: Queries) -> None:
    order = np.random.default_rng(seed).permutation(LOOKUPS)
    outcome = run(queries, order, seed=seed, limits=Limits(), drift_at=1_800)
    assert outcome.hits > 0.02
    assert not outcome.ever_false
    assert not outcome.ever_over
