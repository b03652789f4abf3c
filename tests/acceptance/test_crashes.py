"""Workers are killed in the middle of a batch: every job ends exactly once, and little is asked twice."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.acceptance.chats import ids_of, parse_lines, prompts, results_in, write_chats
from tests.support.processes import Command, WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

JOBS = 300
IN_FLIGHT = 16  # 2 children with 8 each
MIDDLE = 80


@pytest.fixture
def batch_ids(tmp_path: Path) -> list[str]:
    """The custom_ids of `in.jsonl`, in order."""
    return write_chats(tmp_path / "in.jsonl", prompts(JOBS))


def submit(tmp_path: Path, env: dict[str, str]) -> str:
    submitted = stoker("submit", tmp_path / "in.jsonl", env=env)
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def repeated(endpoint: ScriptedEndpoint) -> int:
    """How many calls asked what had been asked before."""
    return sum(count - 1 for count in endpoint.calls().prompts.values())


def assert_each_once(batch: str, ids: list[str], env: dict[str, str]) -> None:
    ended = stoker("watch", batch, "--json", env=env)
    figures = json.loads(ended.stdout)
    assert (ended.returncode, figures["state"]) == (0, "completed"), ended.stderr
    assert (figures["done"], figures["failed"]) == (JOBS, 0)
    assert ids_of(parse_lines(stoker("results", batch, env=env).stdout)) == ids


def test_a_killed_worker_costs_only_what_it_had_not_written(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, batch_ids: list[str]
) -> None:
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        for process in killed.processes():  # as the kernel does with a container: all at once
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not killed.processes(), 5, "all of it is gone")
        unwritten = endpoint.calls().count - results_in(postgres_url)
    assert results_in(postgres_url) < JOBS
    with WorkerProcess("next", env=env, folder=tmp_path):
        assert_each_once(batch, batch_ids, env)
    print(
        f"\nkill -9 of a worker and its children: {repeated(endpoint)} of {JOBS} jobs ran twice; "
        f"in flight or unwritten at that moment: {unwritten}"
    )
    assert repeated(endpoint) <= unwritten


def test_children_whose_parent_was_killed_harm_nothing_and_do_not_stay(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, batch_ids: list[str]
) -> None:
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        unwritten = IN_FLIGHT + endpoint.calls().count - results_in(postgres_url)
        killed.kill9()
        with WorkerProcess("next", env=env, folder=tmp_path):
            assert_each_once(batch, batch_ids, env)
        print(f"\nkill -9 of a worker's parent process: {repeated(endpoint)} of {JOBS} jobs ran twice")
        wait_until(lambda: not killed.processes(), 15, "the killed worker's children are gone")
    assert repeated(endpoint) <= unwritten


def test_a_killed_child_is_replaced_and_its_shard_runs_again(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, batch_ids: list[str]
) -> None:
    with WorkerProcess("one", env=env, folder=tmp_path) as worker:
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        before = worker.children()
        unwritten = IN_FLIGHT + endpoint.calls().count - results_in(postgres_url)
        os.kill(_a_pool_child(worker), signal.SIGKILL)
        assert_each_once(batch, batch_ids, env)
        wait_until(lambda: len(worker.children()) == len(before), 10, "there are as many children as before")
        assert worker.status is None
    print(f"\nkill -9 of a prefork child: {repeated(endpoint)} of {JOBS} jobs ran twice")
    assert repeated(endpoint) <= unwritten


def test_a_drain_finishes_and_commits_what_is_in_flight_and_leaves_no_process(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, batch_ids: list[str]
) -> None:
    with WorkerProcess("drained", env=env, folder=tmp_path) as drained:
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        status = drained.terminate(timeout_s=15)
        assert status == 0, drained.log
        assert drained.processes() == []
    done = results_in(postgres_url)
    assert MIDDLE <= done < JOBS
    assert endpoint.calls().count == done, "every call that was made has its result"
    with WorkerProcess("next", env=env, folder=tmp_path):
        assert_each_once(batch, batch_ids, env)
    assert repeated(endpoint) == 0


def test_a_drain_longer_than_the_grace_gives_back_what_is_not_finished(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(4))
    endpoint.script("[[latency 60]]", match="question 2")
    env = env | {"STOKER_WORKER__GRACE_S": "1"}
    with WorkerProcess("drained", env=env, folder=tmp_path) as drained:
        batch = submit(tmp_path, env)
        wait_until(lambda: endpoint.calls().count == 4, 30, "all jobs are in flight")
        assert drained.terminate(timeout_s=10) == 0, drained.log
        assert drained.processes() == []
    endpoint.script("", match="question 2")
    with WorkerProcess("next", env=env, folder=tmp_path):
        assert stoker("watch", batch, env=env).returncode == 0
    assert ids_of(parse_lines(stoker("results", batch, env=env).stdout)) == ids
    assert repeated(endpoint) == 1


def test_a_standby_takes_over_when_the_dispatch_leader_is_killed(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, batch_ids: list[str]
) -> None:
    with WorkerProcess("one", env=env, folder=tmp_path) as worker, Command("dispatch", env=env):
        leader = worker.dispatcher()
        assert leader is not None
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        os.kill(leader, signal.SIGKILL)
        assert_each_once(batch, batch_ids, env)
    assert repeated(endpoint) == 0


def test_a_standby_takes_over_from_a_leader_that_is_frozen(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str, batch_ids: list[str]
) -> None:
    with WorkerProcess("one", env=env, folder=tmp_path) as worker, Command("dispatch", env=env):
        leader = worker.dispatcher()
        assert leader is not None
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        os.kill(leader, signal.SIGSTOP)
        try:
            assert_each_once(batch, batch_ids, env)
        finally:
            os.kill(leader, signal.SIGCONT)
    assert repeated(endpoint) == 0


def test_a_rolling_restart_of_all_workers_repeats_no_job(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str
) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(12 * JOBS))
    with ExitStack() as stack:
        old = [stack.enter_context(WorkerProcess(f"old-{n}", env=env, folder=tmp_path)) for n in range(2)]
        batch = submit(tmp_path, env)
        wait_until(lambda: results_in(postgres_url) >= MIDDLE, 30, "the batch is in its middle")
        for number, worker in enumerate(old):
            assert worker.terminate(timeout_s=15) == 0, worker.log
            stack.enter_context(WorkerProcess(f"new-{number}", env=env, folder=tmp_path))
        assert results_in(postgres_url) < len(ids), "all were restarted while the batch ran"
        assert stoker("watch", batch, env=env).returncode == 0
    assert ids_of(parse_lines(stoker("results", batch, env=env).stdout)) == ids
    assert repeated(endpoint) == 0


def test_a_worker_starts_its_dispatch_process_again_when_that_is_killed(
    env: dict[str, str], tmp_path: Path, worker: WorkerProcess
) -> None:
    first = worker.dispatcher()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: worker.dispatcher() not in {None, first}, 8, "another dispatch process runs")


def _a_pool_child(worker: WorkerProcess) -> int:
    """A prefork child, not the processes that the parent starts beside its pool."""
    names = {process.pid: process.command for process in worker.processes()}
    return next(pid for pid in worker.children() if "celery" in names.get(pid, ""))
