"""How far ahead a child claims, and how large shards are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cutting import for_workers
from pipeline.pace import LEAST_JOBS, MOST_JOBS, SHARDS_A_SECOND, Pace, jobs_in_a_shard
from runtime.settings import Settings, ShardSettings
from store.presence import WorkerPresence

SECONDS = st.floats(0.001, 1000)
PLACES = st.integers(1, 4096)


def paced(*, service_s: float, claim_s: float) -> Pace:
    pace = Pace()
    for _ in range(200):
        pace.served(service_s)
        pace.claimed(claim_s)
    return pace


def test_before_the_first_answer_nothing_is_kept_waiting() -> None:
    pace = Pace()
    pace.claimed(0.5)

    assert pace.reserve(64) == 0


@given(service_s=SECONDS, claim_s=SECONDS, places=PLACES)
def test_the_reserve_lasts_through_a_claim_unless_it_would_exceed_the_places(
    service_s: float, claim_s: float, places: int
) -> None:
    taken_meanwhile = places / service_s * claim_s

    assert paced(service_s=service_s, claim_s=claim_s).reserve(places) >= min(places, taken_meanwhile * 0.99)


def test_jobs_of_twenty_seconds_keep_one_waiting_and_instant_ones_a_whole_fill() -> None:
    assert paced(service_s=20, claim_s=0.01).reserve(64) == 1
    assert paced(service_s=0, claim_s=0.01).reserve(64) == 64


def test_a_new_speed_is_learned_from_some_readings_and_one_odd_reading_changes_little() -> None:
    pace = paced(service_s=1, claim_s=0.01)
    pace.served(30)
    assert pace.service_s < 3
    for _ in range(100):
        pace.served(10)
    assert 9 < pace.service_s < 11


@given(service_s=SECONDS, places=PLACES)
def test_a_shard_is_within_its_bounds_and_is_not_claimed_too_often(service_s: float, places: int) -> None:
    jobs = jobs_in_a_shard(places, service_s)

    assert LEAST_JOBS <= jobs <= MOST_JOBS
    assert jobs == MOST_JOBS or places / service_s / jobs <= SHARDS_A_SECOND + 0.1


@pytest.mark.parametrize(
    ("places", "service_s", "jobs"),
    [(4, 2.0, 16), (32, 2.0, 32), (64, 0.0, 64), (64, 2.0, 64), (1024, 4.0, 64), (64, 0.02, 256)],
)
def test_shards_of_small_slow_and_fast_engines(places: int, service_s: float, jobs: int) -> None:
    assert jobs_in_a_shard(places, service_s) == jobs


def worker(*, in_flight: int, service_s: float) -> WorkerPresence:
    return WorkerPresence(
        name="w", children=2, models=["m"], engine="e", healthy=True, in_flight=in_flight, service_s=service_s
    )


def test_the_workers_decide_unless_the_setting_does_or_there_are_none() -> None:
    unset, fast = Settings.model_construct(), [worker(in_flight=4, service_s=1), worker(in_flight=64, service_s=0.02)]
    fixed = Settings.model_construct(shard=ShardSettings(max_jobs=9))

    assert for_workers(unset, fast).shard.max_jobs == MOST_JOBS
    assert for_workers(unset, fast[:1]).shard.max_jobs == LEAST_JOBS
    assert for_workers(unset, []).shard.max_jobs is None
    assert for_workers(fixed, fast).shard.max_jobs == 9
