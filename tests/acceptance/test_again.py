"""`stoker` runs lines again: force, skip, retry, reuse; and a submitter killed half-way leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text

from store.database import Database
from store.submissions import delete_abandoned_batches
from tests.acceptance.chats import chat, ids_of, parse_lines, prompts, write_chats
from tests.support.batches import execute
from tests.support.processes import Command, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until


def test_force_makes_a_new_batch_with_its_own_priority_and_weight(services: dict[str, str], tmp_path: Path) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(3))
    first = stoker("submit", tmp_path / "in.jsonl", env=services)
    again = stoker("submit", tmp_path / "in.jsonl", env=services)
    assert again.stdout == first.stdout and "--force" in again.stderr
    wished = ("--force", "--priority", "high", "--weight", "2.5")
    forced = stoker("submit", tmp_path / "in.jsonl", *wished, env=services)
    assert forced.returncode == 0 and forced.stdout != first.stdout, forced.stderr
    shown = json.loads(stoker("status", forced.stdout.strip(), "--json", env=services).stdout)
    assert (shown["priority"], shown["weight"], shown["waiting"]) == ("high", 2.5, None)
    assert "high, weight 2.5" in stoker("status", forced.stdout.strip(), env=services).stderr
    tiny = stoker("submit", tmp_path / "in.jsonl", "--weight", "1e-310", env=services)
    assert (tiny.returncode, "0.001 to 1000" in tiny.stderr) == (2, True)
    refused = stoker("submit", tmp_path / "in.jsonl", "--weight", "0", env=services)
    assert refused.returncode == 2 and "from 0.001" in refused.stderr


def test_skip_bad_reports_the_first_lines_and_writes_all_beside_the_input(
    services: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(chat("a", "x") + "{not json\n" * 30 + chat("b", "y") + chat("a", "z"))
    refused = stoker("submit", file, env=services)
    assert refused.returncode == 2
    submitted = stoker("submit", file, "--skip-bad", "--json", env=services)
    assert submitted.returncode == 0, submitted.stderr
    figures = json.loads(submitted.stdout)
    assert (figures["jobs"], figures["skipped"]) == (2, 31)
    assert "line 2" in submitted.stderr and "line 21" in submitted.stderr and "line 22" not in submitted.stderr
    skipped = parse_lines((tmp_path / "in.skipped.jsonl").read_text())
    assert [line["line"] for line in skipped] == [*range(2, 32), 33]
    assert set(skipped[-1]) == {"line", "code", "field", "message"}
    assert json.loads(stoker("status", figures["batch"], "--json", env=services).stdout)["skipped"] == 31
    stoker("submit", file, "--skip-bad", env=services)
    assert len(parse_lines((tmp_path / "in.skipped.jsonl").read_text())) == 31, "the same submit keeps its report"
    assert list(tmp_path.glob("*.part")) == []
    before = file.read_bytes()
    replaced = stoker("submit", file, "--skip-bad", "--skipped", file, env=services)
    assert replaced.returncode == 2 and "is the input itself" in replaced.stderr
    replaced = stoker("run", file, "-o", file, env=services)
    assert replaced.returncode == 2 and "is the input itself" in replaced.stderr
    assert file.read_bytes() == before


@pytest.mark.usefixtures("worker")
def test_failed_lines_run_again_by_retry_and_the_others_are_taken_over_by_reuse(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    asked = [text + (" [[status 400]]" if number < 3 else "") for number, text in enumerate(prompts(20))]
    ids = write_chats(tmp_path / "in.jsonl", asked)
    first = stoker("submit", tmp_path / "in.jsonl", env=env).stdout.strip()
    assert stoker("watch", first, env=env).returncode == 1
    retried = stoker("retry", first, "--window", "1h", "--json", env=env)
    assert retried.returncode == 0, retried.stderr
    figures = json.loads(retried.stdout)
    assert (figures["jobs"], figures["reused"]) == (3, False)
    assert stoker("watch", figures["batch"], env=env).returncode == 1
    assert ids_of(parse_lines(stoker("results", figures["batch"], "--errors", env=env).stdout)) == ids[:3]
    assert first in stoker("status", figures["batch"], env=env).stderr
    stated = stoker("retry", "batch_ffff", env=env)
    assert stated.returncode == 2 and "stoker status" in stated.stderr

    before = endpoint.calls().count
    write_chats(tmp_path / "in.jsonl", prompts(20))
    reused = stoker("submit", tmp_path / "in.jsonl", "--reuse", first, "--json", env=env)
    assert reused.returncode == 0, reused.stderr
    figures = json.loads(reused.stdout)
    assert (figures["jobs"], figures["results_reused"]) == (20, 17)
    assert stoker("watch", figures["batch"], env=env).returncode == 0
    assert endpoint.calls().count == before + 3
    lines = parse_lines(stoker("results", figures["batch"], env=env).stdout)
    assert ids_of(lines) == ids
    assert [line["stoker"]["source"] for line in lines] == ["engine"] * 3 + ["reused"] * 17

    write_chats(tmp_path / "in.jsonl", prompts(20))
    whole = stoker("submit", tmp_path / "in.jsonl", "--reuse", figures["batch"], env=env).stdout.strip()
    watched = stoker("watch", whole, "--json", env=env)
    assert (watched.returncode, json.loads(watched.stdout)["state"]) == (0, "completed")
    assert endpoint.calls().count == before + 3, "nothing was left to run"


def test_status_lists_poison_jobs_and_says_what_waits_for_another_try(
    services: dict[str, str], tmp_path: Path, postgres_url: str
) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(3))
    batch = stoker("submit", tmp_path / "in.jsonl", env=services).stdout.strip()
    assert json.loads(stoker("status", "--dead", "--json", env=services).stdout) == []
    database = Database(postgres_url)
    execute(
        database,
        "INSERT INTO results (batch_id, seq, outcome, source, error_code, error_message, prompt_tokens, "
        "completion_tokens, cached_tokens, reasoning_tokens, duration_ms) SELECT id, 1, 'failed', 'none', "
        "'poison_job', 'it killed 6 workers', 0, 0, 0, 0, 0 FROM batches",
    )
    execute(database, "UPDATE shards SET done = 1, failed = 1")
    execute(
        database,
        "INSERT INTO job_tries (batch_id, seq, tries, not_before, last_error) "
        "SELECT id, 2, 3, now() + interval '40 s', 'HTTP 503: busy' FROM batches",
    )
    database.close()
    shown = stoker("status", batch, env=services).stderr
    assert "wait for another try: 1 (tries so far: 3 of 8 at most, the next in " in shown and "HTTP 503: busy" in shown
    assert json.loads(stoker("status", batch, "--json", env=services).stdout)["waiting"]["max_tries"] == 8
    [dead] = json.loads(stoker("status", "--dead", batch[:18], "--json", env=services).stdout)
    assert (dead["batch"], dead["line"], dead["message"]) == (batch, 2, "it killed 6 workers")
    assert "it killed 6 workers" in stoker("status", "--dead", env=services).stdout


@pytest.mark.parametrize("reuse", [False, True])
def test_a_submitter_killed_half_way_leaves_nothing_visible_and_after_its_lease_nothing(
    services: dict[str, str], tmp_path: Path, postgres_url: str, reuse: bool
) -> None:
    write_chats(tmp_path / "small.jsonl", prompts(3))
    first = stoker("submit", tmp_path / "small.jsonl", env=services).stdout.strip()
    write_chats(tmp_path / "in.jsonl", prompts(150_000))
    database = Database(postgres_url)
    jobs = "SELECT count(*) FROM jobs"
    before = _count(database, jobs)
    more = ("--reuse", first) if reuse else ()
    with Command("submit", tmp_path / "in.jsonl", *more, env=services) as command:
        wait_until(lambda: _count(database, jobs) > before, 60, "jobs of the first chunk")
        command.process.kill()
        assert command.process.wait(30) == -9
    copying = "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE 'copy%' AND state <> 'idle'"
    wait_until(lambda: _count(database, f"{copying} AND datname = current_database()") == 0, 30, "the end of its COPY")
    listed = json.loads(stoker("status", "--json", env=services).stdout)
    assert [entry["batch"] for entry in listed] == [first]
    execute(database, "UPDATE batches SET lease_until = now() - interval '1 s' WHERE state = 'validating'")
    with database.transaction() as session:
        assert len(delete_abandoned_batches(session)) == 1
    assert (_count(database, jobs), _count(database, "SELECT count(*) FROM shards")) == (before, 1)
    database.close()


def _count(database: Database, statement: str) -> int:
    with database.transaction() as session:
        return int(session.execute(text(statement)).scalar_one())
