"""Spill-over: no job goes away that own engines would do in time, and it stops as soon as they catch up."""

from __future__ import annotations

import math
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rates import LEAST_JOBS, LEAST_S, WINDOW_S
from pipeline.spill import SpillWatch, spill_jobs
from store.database import Database
from store.engines import register_engine
from store.money import open_batch_money
from store.shards import Claim, write_results
from tests.support.batches import answers, batch_row, chats, claimed, dispatch_all, execute, store_batch

JOBS = st.integers(0, 10**7)
RATES = st.floats(0.0, 1e4)
TIMES = st.floats(-100.0, 1e6)


@given(remaining=JOBS, own_rate=RATES, time_left_s=TIMES, out=JOBS)
def test_only_the_difference_is_sent_away_and_what_is_away_counts(
    remaining: int, own_rate: float, time_left_s: float, out: int
) -> None:
    jobs = spill_jobs(remaining, own_rate=own_rate, time_left_s=time_left_s, out=out)
    own = own_rate * max(0.0, time_left_s)
    assert 0 <= jobs <= remaining
    assert jobs == 0 or jobs + out < remaining - own + 1, "never more than the difference"
    assert jobs + out >= remaining - own, "never so few that it ends late"
    if own >= remaining or out >= remaining:
        assert jobs == 0


@given(remaining=JOBS, own_rate=RATES, time_left_s=TIMES, out=JOBS, more=st.integers(1, 1000))
def test_it_moves_with_what_remains_and_against_what_own_engines_can(
    remaining: int, own_rate: float, time_left_s: float, out: int, more: int
) -> None:
    jobs = spill_jobs(remaining, own_rate=own_rate, time_left_s=time_left_s, out=out)
    assert spill_jobs(remaining + more, own_rate=own_rate, time_left_s=time_left_s, out=out) >= jobs
    assert spill_jobs(remaining, own_rate=own_rate + more, time_left_s=time_left_s, out=out) <= jobs
    assert spill_jobs(remaining, own_rate=own_rate, time_left_s=time_left_s + more, out=out) <= jobs
    assert spill_jobs(remaining, own_rate=own_rate, time_left_s=time_left_s, out=out + more) <= jobs


@given(
    total=st.integers(1, 2000),
    rates=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=8),
    window_s=st.integers(10, 120),
    away_s=st.integers(1, 5),
)
def test_a_batch_ends_in_time_and_own_engines_are_never_idle_for_it(
    total: int, rates: list[float], window_s: int, away_s: int
) -> None:
    """Its window second by second, as own engines change their pace; endpoints take `away_s` for a job."""
    done = spilled = 0
    own, away = 0.0, [0] * away_s
    change_s = math.ceil(window_s / len(rates))
    for second in range(window_s):
        rate = rates[second // change_s]
        jobs = spill_jobs(total - done, own_rate=rate, time_left_s=window_s - second, out=sum(away))
        done += away.pop(0)
        away.append(jobs)
        spilled += jobs
        own = min(own + rate, total - spilled)
        done = int(own) + spilled - sum(away)
    assert int(own) + spilled >= total - 1
    if len(rates) == 1:
        assert spilled <= max(0, math.ceil(total - rates[0] * window_s)) + 1


class Clock:
    """A clock that a test winds."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """A batch of 200 jobs in a window of 1000 s, a shard of it running, and the watch over it."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.clock = Clock()
        self.watch = SpillWatch(self.clock)
        self.batch_id: UUID = store_batch(database, folder, chats(200), shard_jobs=200)
        with database.transaction() as session:
            open_batch_money(session, self.batch_id, 10**9)
            self.own = register_engine(session, {"engine": "vllm"})
            self.cloud = register_engine(session, {"kind": "endpoint", "name": "cloud", "trust": "external"})
        self.set('options = options || \'{"trust": "external"}\'')
        self.left(1000)
        self.taken: Claim = claimed(database, dispatch_all(database)[0])
        self.done = 0

    def set(self, what: str) -> None:
        execute(self.database, f"UPDATE batches SET {what} WHERE id = :id", id=self.batch_id)

    def left(self, seconds: float) -> None:
        at = "clock_timestamp() + make_interval(secs => {0})"
        self.set(f"expires_at = {at.format(seconds)}, in_progress_at = {at.format(seconds - 1000)}")

    def finish(self, jobs: int, *, engine_id: int) -> None:
        seqs = range(self.done, self.done + jobs)
        with self.database.transaction() as session:
            assert write_results(session, self.taken, answers(seqs), engine_id=engine_id, lease_s=30.0)
        self.done += jobs

    def swept(self, *, after_s: float = 0.0) -> int:
        """How many jobs may go, after a while."""
        self.clock.now_s += after_s
        with self.database.transaction() as session:
            self.watch.sweep(session)
        return int(batch_row(self.database, self.batch_id)["spill"])


@pytest.fixture
def watched(database: Database, tmp_path: Path) -> Watched:
    return Watched(database, tmp_path)


def about(jobs: float) -> object:
    """Up to a second of Postgres's clock passes in a test."""
    return pytest.approx(jobs, abs=1.0)


def test_the_difference_is_of_what_own_engines_did_and_goes_when_they_catch_up(watched: Watched) -> None:
    assert watched.swept() == 0, "nothing is known"
    watched.finish(6, engine_id=watched.own)
    assert watched.swept(after_s=LEAST_S) == 0, "not yet enough"
    assert watched.swept(after_s=WINDOW_S - LEAST_S) == about(194 - 0.1 * 950)
    watched.finish(20, engine_id=watched.cloud)
    assert watched.swept(after_s=WINDOW_S) == about(174 - 0.1 * 950), (
        "nobody has done anything for a minute: the rate stays"
    )
    watched.finish(20, engine_id=watched.own)
    assert watched.swept(after_s=LEAST_S) == 0, "own engines are quick again"


def test_jobs_that_are_away_count(watched: Watched) -> None:
    watched.swept()
    watched.finish(6, engine_id=watched.own)
    execute(
        watched.database,
        "INSERT INTO money_reservations (shard_id, budget_id, fence, amount, spent, requests) "
        "SELECT :shard, id, 1, 30, 0, 30 FROM money_budgets",
        shard=watched.taken.shard_id,
    )
    assert watched.swept(after_s=WINDOW_S) == about(194 - 0.1 * 950 - 30)


def test_while_a_batch_waits_for_its_turn_its_engines_are_not_called_slow(watched: Watched) -> None:
    watched.swept()
    watched.finish(LEAST_JOBS, engine_id=watched.own)
    assert watched.swept(after_s=LEAST_S) == 0
    execute(watched.database, "UPDATE shards SET state = 'pending', lease_until = NULL")
    assert [watched.swept(after_s=WINDOW_S) for _ in range(3)] == [0, 0, 0]


def test_engines_that_do_nothing_are_given_up_when_most_of_the_window_is_over(watched: Watched) -> None:
    assert [watched.swept(after_s=WINDOW_S) for _ in range(3)] == [0, 0, 0]
    watched.left(249)
    assert watched.swept(after_s=1.0) == 200


@pytest.mark.parametrize(
    "otherwise",
    [
        'options = options || \'{"trust": "own"}\'',
        "paused_reason = 'a look'",
        "ending = 'cancelled', state = 'cancelling'",
    ],
)
def test_only_a_running_batch_whose_prompts_may_leave_spills(watched: Watched, otherwise: str) -> None:
    watched.left(100)
    watched.set(otherwise)
    assert watched.swept() == 0


def test_a_batch_without_money_does_not_spill(watched: Watched) -> None:
    watched.left(100)
    execute(watched.database, "DELETE FROM money_budgets")
    assert watched.swept() == 0
