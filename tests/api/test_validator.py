"""A validator process where Postgres is away."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.support.processes import REPOSITORY, clean_environment
from tests.support.waiting import wait_until

START_S = 60.0


def test_a_validator_takes_no_batch_before_it_has_seen_the_schema(tmp_path: Path) -> None:
    away = {
        "STOKER_POSTGRES__URL": "postgresql://nobody@127.0.0.1:1/none",
        "STOKER_REDIS__URL": "redis://127.0.0.1:1/0",
        "STOKER_BROKER__URL": "amqp://guest@127.0.0.1:1//",
        "STOKER_GATEWAY__FILES": str(tmp_path / "files"),
    }
    log = tmp_path / "log"
    with log.open("w") as written:
        validator = subprocess.Popen(
            [sys.executable, "-m", "api.validator"], cwd=REPOSITORY, env=clean_environment() | away, stderr=written
        )
    try:
        wait_until(lambda: "schema_waits" in log.read_text(), START_S, "it waits for Postgres")
        validator.send_signal(signal.SIGTERM)
        assert validator.wait(START_S) == 0
    finally:
        validator.kill()
        validator.wait()
    assert "batch" not in log.read_text()
