"""The HTTP contract holds under any order of requests; `make fuzz` runs this for longer, with other seeds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from models.states import Scope
from pipeline.keys import issue_key
from store.database import Database
from tests.fuzz.contract import Door, machine_of
from tests.support.gateway_process import GatewayProcess

STEPS = 20
SEQUENCES = 12  # in the ordinary suite
SECONDS = "STOKER_FUZZ_S"  # how long instead, and where the counts go
COUNTS = "STOKER_FUZZ_COUNTS"
SEED = "STOKER_FUZZ_SEED"


def test_the_contract_holds_under_any_order_of_requests(
    database: Database, postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    with database.transaction() as session:
        keys = [
            issue_key(session, tenant=tenant, name="fuzz", scopes=tuple(Scope), requests_per_minute=10_000_000).key.text
            for tenant in ("one", "two")
        ]
    env = {
        "STOKER_POSTGRES__URL": postgres_url,
        "STOKER_BROKER__URL": "memory://",
        "STOKER_REDIS__URL": redis_url,
        "STOKER_HOME": str(tmp_path),
        "STOKER_GATEWAY__WRONG_KEYS_PER_MINUTE": "1000000",
        "STOKER_GATEWAY__REQUEST_BYTES": "65536",
    }
    began, seconds = time.monotonic(), float(os.environ.get(SECONDS, "0"))
    seed = int(os.environ.get(SEED, "1"))
    with GatewayProcess(env=env, folder=tmp_path) as gateway:
        door = Door(gateway.url, (keys[0], keys[1]))
        try:
            while door.sequences == 0 or time.monotonic() - began < seconds:
                _run(door, seed=seed)
                seed += 1
            assert "request_defect" not in gateway.log
            assert "Traceback" not in gateway.log
        finally:
            if counts := os.environ.get(COUNTS):
                told = {"sequences": door.sequences, "requests": door.statuses.total(), "statuses": door.statuses}
                Path(counts).write_text(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}))


def _run(door: Door, *, seed: int) -> None:
    held = settings(
        max_examples=SEQUENCES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(hypothesis.seed(seed)(machine_of(door)), settings=held)
