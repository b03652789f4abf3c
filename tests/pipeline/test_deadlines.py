"""Deadlines: a batch that will not be done in its window is told of in time, once, and never for a batch that waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from pipeline.deadlines import HOLD_S, MOST_REST_S, SHARE, DeadlineWatch, slack_s
from pipeline.rates import LEAST_S, MOST_MARGIN_S, WINDOW_S
from store.database import Database
from store.deadlines import RunningBatch, live_counts, running_batches
from store.shards import write_results
from tests.support.batches import answers, chats, claimed, dispatch_all, execute, store_batch

WHOLE_S = 3600.0
JOBS = st.integers(0, 10**7)
TIMES = st.floats(-100.0, 1e6)


@given(remaining=JOBS, rate=st.floats(0.0, 1e4), time_left_s=TIMES, more=st.integers(1, 1000))
def test_slack_is_what_is_left_over_and_never_less_than_a_window(
    remaining: int, rate: float, time_left_s: float, more: int
) -> None:
    slack = slack_s(remaining, rate=rate, time_left_s=time_left_s, window_s=WHOLE_S)
    assert -WHOLE_S <= slack <= max(time_left_s, -WHOLE_S)
    assert slack_s(0, rate=rate, time_left_s=time_left_s, window_s=WHOLE_S) == max(time_left_s, -WHOLE_S)
    assert slack_s(remaining + more, rate=rate, time_left_s=time_left_s, window_s=WHOLE_S) <= slack
    if -WHOLE_S < slack < 0 and time_left_s > 0:
        assert rate * time_left_s < remaining, "it is short only if so many jobs cannot be done"
    if slack > 0 and rate:
        assert rate * time_left_s >= remaining


class Clock:
    """A clock that a test winds; it goes on by itself each time that it is looked at."""

    now_s = 1000.0
    look_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.look_s
        return self.now_s


class Told:
    """A watch over one batch of 1,000 jobs in a window of an hour, and what it wrote to the log."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.watch = DeadlineWatch(self.clock)
        self.batch = RunningBatch(uuid4(), 1000, 1000, 0, WHOLE_S, WHOLE_S, is_running=True)

    def after(self, seconds: float, *, jobs: int = 0) -> tuple[int, float | None, list[str]]:
        """(at risk, slack, events) after as many seconds in which so many jobs were done."""
        self.clock.now_s += seconds
        was = self.batch
        left = None if was.time_left_s is None else was.time_left_s - seconds
        self.batch = replace(
            was,
            time_left_s=left,
            remaining=was.remaining - jobs,
            unfinished=was.unfinished - jobs,
            done=was.done + jobs,
        )
        with structlog.testing.capture_logs() as logs:
            found = self.watch.judge([self.batch])
        return found.at_risk, found.least_slack_s, [line["event"] for line in logs]


def test_a_batch_that_gets_slow_is_told_of_once_and_again_when_it_has_recovered() -> None:
    told = Told()
    assert told.after(0) == (0, None, []), "nothing is known"
    assert told.after(LEAST_S, jobs=20)[1] == pytest.approx(WHOLE_S - LEAST_S - 980 / 4)
    at_risk, slack, events = told.after(WINDOW_S, jobs=12)  # a minute at 0.2 a second
    assert (at_risk, events) == (0, []) and slack == pytest.approx(WHOLE_S - 65 - 968 / 0.2)
    assert told.after(HOLD_S, jobs=2)[2] == ["deadline_at_risk"]
    assert told.after(1, jobs=0)[::2] == (1, [])
    at_risk, slack, events = told.after(WINDOW_S, jobs=600)
    assert (at_risk, events) == (0, ["deadline_recovered"]) and slack is not None and slack > MOST_MARGIN_S


def test_what_is_short_for_a_moment_is_not_told() -> None:
    told = Told()
    told.after(0)
    told.after(WINDOW_S, jobs=6)
    at_risk, slack, events = told.after(HOLD_S / 2, jobs=400)
    assert (at_risk, events) == (0, []) and slack is not None and slack > 0
    told.after(WINDOW_S, jobs=1)
    assert told.after(WINDOW_S, jobs=1)[2] == ["deadline_at_risk"], "it counts anew from when it was short again"


def test_a_batch_that_waits_is_at_risk_only_when_most_of_its_window_is_over() -> None:
    told = Told()
    told.batch = replace(told.batch, is_running=False)
    for _ in range(10):
        assert told.after(WHOLE_S / 14)[:2] == (0, None)
    told.after(WHOLE_S / 14)
    assert told.after(HOLD_S)[::2] == (1, ["deadline_at_risk"])
    assert told.watch.judge([]).at_risk == 0, "it has ended"


def test_a_batch_without_a_window_has_no_slack_but_its_jobs_count() -> None:
    watch = DeadlineWatch(Clock())
    found = watch.judge([RunningBatch(uuid4(), 7, 5, 3, None, 0.0, is_running=True)])
    assert (found.unfinished, found.at_risk, found.least_slack_s) == (7, 0, None)


def test_the_leader_looks_at_what_is_left_of_batches_and_seldom_where_that_takes_long(
    database: Database, tmp_path: Path
) -> None:
    batch_id: UUID = store_batch(database, tmp_path, chats(10), shard_jobs=5)
    store_batch(database, tmp_path, chats(3), shard_jobs=5)
    held = claimed(database, dispatch_all(database)[0])
    with database.transaction() as session:
        write_results(session, held, answers(held.seqs[:3]), engine_id=None, lease_s=30)
    with database.transaction() as session:
        found = {batch.id: batch for batch in running_batches(session)}
        assert live_counts(session) == {"in_progress": (2, 0)}
    batch = found[batch_id]
    assert (batch.unfinished, batch.remaining, batch.done, batch.is_running) == (7, 7, 3, True)
    assert batch.time_left_s is not None and 0 < batch.time_left_s <= batch.window_s

    clock = Clock()
    watch = DeadlineWatch(clock)
    execute(database, "UPDATE batches SET paused_reason = 'p' WHERE id = :id", id=batch_id)
    assert watch.look(database).unfinished == 3, "what is paused stands still rightly"
    execute(database, "UPDATE batches SET paused_reason = NULL")
    assert watch.look(database).unfinished == 10
    clock.look_s = 0.2
    execute(database, "UPDATE batches SET ending = 'cancelled', state = 'cancelling' WHERE id = :id", id=batch_id)
    assert watch.look(database).unfinished == 3, "what takes no time is done again at once"
    execute(database, "UPDATE batches SET ending = 'cancelled', state = 'cancelling'")
    clock.now_s += 0.2 / SHARE - 1
    assert watch.look(database).unfinished == 3, "what took long waits"
    clock.now_s += MOST_REST_S
    assert watch.look(database).unfinished == 0
