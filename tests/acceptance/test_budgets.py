"""A budget in real workers, killed in the middle: what fits is answered, the rest says why, nothing exceeds it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psycopg

from tests.acceptance.chats import ids_of, parse_lines, prompts, results_in, write_chats
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

JOBS = 160
CAP = 6_500  # 10 jobs at once at the most, of some 62 tokens each
ANSWER = " ".join(["word"] * 60)
FIGURES = """
SELECT spent, reserved, (SELECT count(*) FROM reservations) AS reservations,
    (SELECT sum(prompt_tokens + completion_tokens) FROM results) AS in_results,
    (SELECT state FROM batches) AS state, (SELECT count(*) FROM results WHERE outcome <> 'failed') AS answered
FROM budgets"""


def figures_in(postgres_url: str) -> dict[str, Any]:
    with psycopg.connect(postgres_url, row_factory=psycopg.rows.dict_row) as connection:
        row = connection.execute(FIGURES).fetchone()
    assert row is not None
    return row


def test_a_budget_that_is_met_ends_a_batch_cleanly_though_a_worker_is_killed(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str
) -> None:
    endpoint.script(f"[[answer {ANSWER}]][[latency 0.1]]", match="question")
    env = env | {"STOKER_WORKER__LEASE_S": "2", "STOKER_WORKER__HEARTBEAT_S": "0.5"}
    ids = write_chats(tmp_path / "in.jsonl", prompts(JOBS))
    wished = (tmp_path / "in.jsonl", "--set", "max_tokens=64", "--set", "temperature=0")
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        submitted = stoker("submit", *wished, "--budget-tokens", str(CAP), env=env)
        assert submitted.returncode == 0, submitted.stderr
        batch = submitted.stdout.strip()
        wait_until(lambda: results_in(postgres_url) >= 20, 30, "the batch is in its middle")
        wait_until(lambda: figures_in(postgres_url)["reserved"] > 0, 30, "tokens are reserved")
        for process in killed.processes():
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not killed.processes(), 5, "all of it is gone")
    with WorkerProcess("next", env=env, folder=tmp_path):
        wait_until(lambda: figures_in(postgres_url)["state"] == "completed", 60, "the batch has ended")
        found = figures_in(postgres_url)
        errors = parse_lines(stoker("results", batch, "--errors", env=env).stdout)
        print(f"\n{found['answered']} of {JOBS} jobs in {endpoint.calls().count} requests within {CAP:,}: {found}")
        assert {line["error"]["code"] for line in errors} == {"budget_exceeded"}
        assert "the batch's budget has" in errors[0]["error"]["message"]
        assert (len(errors) + found["answered"], set(ids_of(errors)) < set(ids)) == (JOBS, True)
        assert found["spent"] == found["in_results"]
        assert CAP - 700 < found["spent"] <= CAP, "as far as the next job was sure to fit"
        assert (found["reserved"], found["reservations"]) == (0, 0)
        shown = stoker("status", batch, env=env)
        assert f"budget: {found['spent']:,} of {CAP:,} tokens spent" in shown.stderr
        # Answers that are there cost nothing, and are given where nothing may be spent.
        output = ("-o", tmp_path / "out.jsonl", "--json")
        free = json.loads(stoker("run", *wished, *output, "--budget-tokens", "1", env=env).stdout)
    assert (free["from_cache"], free["failed"], free["tokens_out"]) == (found["answered"], len(errors), 0)
