"""Two minutes of chaos with every fault in it: nothing is lost, nothing comes twice, little is asked twice."""

from __future__ import annotations

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.run import run_chaos, table

SEED = 3
BATCH_JOBS = 1500
EVERY_S = 3.0  # three times as often as `make chaos`, so the share of repeated jobs is not held to its bound here


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_no_fault_loses_a_job_ends_one_twice_or_leaves_anything_behind() -> None:
    outcome = run_chaos(list(reversed(FAULTS)), seed=SEED, job_s=0.2, batch_jobs=BATCH_JOBS, every_s=EVERY_S)
    print(f"\n{table(outcome)}")
    assert outcome.problems == []
    assert {fault.fault for fault in outcome.injected} == set(FAULTS)
