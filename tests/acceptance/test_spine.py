"""The way of a batch through real processes: the `stoker` command, RabbitMQ, Postgres, Redis, a worker."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from store.database import Database
from tests.acceptance.chats import MODEL, chat, ids_of, parse_lines, prompts, read_lines, results_in, write_chats
from tests.support.batches import execute
from tests.support.processes import Command, WorkerProcess, marked, new_mark, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

CLOSED_PORT = 9  # discard: nothing listens there
REMEDIES = {
    "STOKER_POSTGRES__URL": f"postgresql://postgres@127.0.0.1:{CLOSED_PORT}/none",
    "STOKER_BROKER__URL": f"amqp://guest:guest@127.0.0.1:{CLOSED_PORT}//",
    "STOKER_REDIS__URL": f"redis://127.0.0.1:{CLOSED_PORT}/0",
    "STOKER_ENGINE__URL": f"http://127.0.0.1:{CLOSED_PORT}/v1",
}


@pytest.mark.usefixtures("worker")
def test_submit_watch_results_gives_every_custom_id_once_and_in_input_order(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    asked = prompts(100)
    ids = write_chats(tmp_path / "in.jsonl", asked)
    submitted = stoker("submit", tmp_path / "in.jsonl", env=env)
    batch = submitted.stdout.strip()
    assert submitted.returncode == 0 and batch.startswith("batch_"), submitted.stderr
    assert f"stoker watch {batch[:14]}" in submitted.stderr
    watched = stoker("watch", batch[:14], env=env)
    assert watched.returncode == 0, watched.stderr
    written = stoker("results", batch, "-o", tmp_path / "out.jsonl", env=env)
    assert written.returncode == 0 and "100 lines" in written.stderr

    lines = read_lines(tmp_path / "out.jsonl")
    assert ids_of(lines) == ids
    assert [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines] == [
        f"echo: {prompt}" for prompt in asked
    ]
    assert all(
        line["error"] is None and line["stoker"] == {"outcome": "succeeded", "source": "engine"} for line in lines
    )
    assert endpoint.calls().count == 100
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["jobs"]["succeeded"] == 100
    assert manifest["engines"] == [{"kind": "external", "url": endpoint.url, "version": "scripted-1"}]


@pytest.mark.usefixtures("worker")
def test_every_command_prints_json_for_programs(env: dict[str, str], tmp_path: Path) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(10))
    submitted = json.loads(stoker("submit", tmp_path / "in.jsonl", "--json", env=env).stdout)
    assert submitted == {
        "batch": submitted["batch"],
        "jobs": 10,
        "reused": False,
        "skipped": 0,
        "followers": 0,
        "results_reused": 0,
    }
    watched = json.loads(stoker("watch", submitted["batch"], "--json", env=env).stdout)
    assert (watched["state"], watched["jobs"], watched["done"], watched["failed"]) == ("completed", 10, 10, 0)
    assert watched["tokens_out"] == 30, "`echo: question N` is three words"
    assert json.loads(stoker("status", submitted["batch"], "--json", env=env).stdout)["done"] == 10
    listed = json.loads(stoker("status", "--json", env=env).stdout)
    assert [entry["batch"] for entry in listed] == [submitted["batch"]]
    table = stoker("status", env=env).stdout
    assert submitted["batch"][:18] in table and "in.jsonl" in table
    dry = json.loads(stoker("submit", "--dry-run", "--json", tmp_path / "in.jsonl", env=env).stdout)
    assert (dry["lines"], dry["models"]) == (10, {MODEL: 10})


@pytest.mark.usefixtures("worker")
def test_a_batch_with_failed_jobs_exits_1_and_says_why_in_the_error_file(env: dict[str, str], tmp_path: Path) -> None:
    ids = write_chats(tmp_path / "in.jsonl", ["good", "bad [[status 400]]", "odd [[not json]]", "good too"])
    ended = stoker("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--json", env=env)
    assert ended.returncode == 1, ended.stderr
    assert json.loads(ended.stdout)["failed"] == 2
    assert ids_of(read_lines(tmp_path / "out.jsonl")) == [ids[0], ids[3]]
    errors = read_lines(tmp_path / "out.errors.jsonl")
    assert ids_of(errors) == [ids[1], ids[2]]
    assert errors[0]["response"]["status_code"] == 400
    assert "as the script says" in json.dumps(errors[0])
    assert errors[1]["stoker"]["outcome"] == "failed"
    shown = stoker("results", json.loads(ended.stdout)["batch"], "--errors", env=env)
    assert parse_lines(shown.stdout) == errors


def test_wrong_use_and_bad_input_exit_2_and_name_the_place(services: dict[str, str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chat("a", "x") + "{not json\n" + chat("a", "y"))
    refused = stoker("submit", bad, env=services)
    assert refused.returncode == 2
    assert "line 2" in refused.stderr and "line 3" in refused.stderr
    assert "nothing was stored" in refused.stderr
    assert json.loads(stoker("status", "--json", env=services).stdout) == []
    assert stoker("status", "batch_ffff", env=services).returncode == 2
    assert stoker("submit", tmp_path / "absent.jsonl", env=services).returncode == 2
    assert stoker("no-such-command", env=services).returncode == 2
    half = {name: url for name, url in services.items() if name != "STOKER_BROKER__URL"}
    unset = stoker("status", env=half)
    assert unset.returncode == 2 and "STOKER_BROKER__URL" in unset.stderr


@pytest.mark.parametrize("name", ["STOKER_POSTGRES__URL", "STOKER_REDIS__URL"])
def test_an_unreachable_service_exits_3_and_names_its_variable(
    name: str, services: dict[str, str], tmp_path: Path
) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(2))
    ended = stoker("submit", tmp_path / "in.jsonl", env=services | {name: REMEDIES[name]})
    assert ended.returncode == 3
    assert name in ended.stderr and "Traceback" not in ended.stderr


def test_a_database_that_was_not_migrated_exits_3_with_the_remedy(
    services: dict[str, str], tmp_path: Path, database: Database
) -> None:
    execute(database, "ALTER TABLE batches RENAME TO of_another_version")
    write_chats(tmp_path / "in.jsonl", prompts(1))
    for command in (("status",), ("submit", tmp_path / "in.jsonl")):
        refused = stoker(*command, env=services)
        assert refused.returncode == 3
        assert "lacks a table of this version" in refused.stderr and "stoker migrate" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_an_address_that_is_none_exits_2_and_names_its_variable(services: dict[str, str]) -> None:
    failed = stoker("status", env={**services, "STOKER_POSTGRES__URL": "foo"})
    assert failed.returncode == 2 and "STOKER_POSTGRES__URL: 'foo' is no address" in failed.stderr


@pytest.mark.usefixtures("worker")
def test_equal_deterministic_requests_are_run_once_until_the_cache_is_cleared(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(20))
    wished = ("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--set", "temperature=0")
    assert stoker(*wished, env=env).returncode == 0
    again = stoker(*wished, "--json", env=env)
    assert again.returncode == 0 and endpoint.calls().count == 20, again.stderr
    figures = json.loads(again.stdout)
    assert (figures["from_cache"], figures["tokens_out"]) == (20, 0)
    assert figures["tokens_saved"] > 0
    assert {line["stoker"]["source"] for line in read_lines(tmp_path / "out.jsonl")} == {"exact"}
    stats = json.loads(stoker("cache", "stats", "--json", env=env).stdout)
    assert (stats["entries"], stats["jobs"], stats["exact"], stats["share"]) == (20, 40, 20, 0.5)
    assert "20 answers forgotten" in stoker("cache", "clear", env=env).stderr
    assert stoker(*wished, env=env).returncode == 0
    assert endpoint.calls().count == 40
    assert stoker(*wished, "--cache", "off", env=env).returncode == 0
    assert endpoint.calls().count == 60


def test_no_services_at_all_exit_3_with_the_remedy(tmp_path: Path) -> None:
    ended = stoker("status", env={"STOKER_HOME": str(tmp_path)})
    assert ended.returncode == 3 and "stoker up" in ended.stderr


def test_run_without_a_worker_starts_one_and_leaves_no_process(env: dict[str, str], tmp_path: Path) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(40))
    mark = new_mark()
    with Command("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", env=env, mark=mark) as command:
        ended = command.wait()
        assert marked(mark) == []
    assert ended.returncode == 0, ended.stderr
    assert ids_of(read_lines(tmp_path / "out.jsonl")) == ids
    assert (tmp_path / "out.manifest.json").exists() and not (tmp_path / "out.errors.jsonl").exists()


def test_an_interrupted_run_exits_130_and_its_batch_goes_on_with_the_next_worker(
    env: dict[str, str], tmp_path: Path, postgres_url: str
) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(200))
    mark = new_mark()
    with Command("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", env=env, mark=mark) as command:
        wait_until(lambda: results_in(postgres_url) >= 10, 30, "ten jobs are done")
        command.process.send_signal(signal.SIGINT)
        ended = command.wait()
        assert marked(mark) == []
    assert ended.returncode == 130, ended.stderr
    assert not (tmp_path / "out.jsonl").exists()
    batch = json.loads(stoker("status", "--json", env=env).stdout)[0]["batch"]
    with WorkerProcess("next", env=env, folder=tmp_path):
        assert stoker("watch", batch, env=env).returncode == 0
    assert ids_of(parse_lines(stoker("results", batch, env=env).stdout)) == ids


@pytest.mark.usefixtures("worker")
def test_cancel_keeps_what_has_finished_and_ends_the_rest_as_batch_cancelled(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, postgres_url: str
) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(2_000))
    batch = stoker("submit", tmp_path / "in.jsonl", env=env).stdout.strip()
    wait_until(lambda: results_in(postgres_url) >= 40, 30, "forty jobs are done")
    assert stoker("cancel", batch, env=env).returncode == 0
    watched = stoker("watch", batch, "--json", env=env)
    figures = json.loads(watched.stdout)
    assert (watched.returncode, figures["state"], figures["done"]) == (1, "cancelled", 2_000)
    answered = parse_lines(stoker("results", batch, env=env).stdout)
    errors = parse_lines(stoker("results", batch, "--errors", env=env).stdout)
    assert len(answered) == figures["succeeded"] >= 40 and len(errors) == figures["failed"] >= 100
    assert sorted(ids_of(answered) + ids_of(errors)) == sorted(ids)
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert endpoint.calls().count == len(answered), "what had been sent was finished and kept"
    again = stoker("cancel", batch, env=env)
    assert again.returncode == 2 and "cannot be cancelled" in again.stderr


@pytest.mark.usefixtures("worker")
def test_a_batch_that_mostly_fails_is_paused_and_goes_on_after_resume(
    env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    asked = [text + (" [[status 400]]" if number % 5 < 2 else "") for number, text in enumerate(prompts(600))]
    ids = write_chats(tmp_path / "in.jsonl", asked)
    batch = stoker("submit", tmp_path / "in.jsonl", env=env).stdout.strip()
    paused = stoker("watch", batch, env=env)
    assert paused.returncode == 1
    assert "paused" in paused.stderr and "stoker resume" in paused.stderr
    wait_until(lambda: endpoint.calls().running == 0, 10, "what was in flight has ended")
    count = endpoint.calls().count
    assert 150 <= count < 600
    assert stoker("resume", batch, env=env).returncode == 0
    ended = json.loads(stoker("watch", batch, "--json", env=env).stdout)
    assert (ended["state"], ended["done"], ended["failed"]) == ("completed", 600, 240)
    lines = [
        *parse_lines(stoker("results", batch, env=env).stdout),
        *parse_lines(stoker("results", batch, "--errors", env=env).stdout),
    ]
    assert sorted(ids_of(lines)) == sorted(ids)
    assert stoker("resume", batch, env=env).returncode == 2


@pytest.mark.usefixtures("worker")
def test_results_follow_prints_lines_in_input_order_while_the_batch_runs(
    env: dict[str, str], tmp_path: Path, postgres_url: str
) -> None:
    asked = [text + (" [[latency 5]]" if number == 3 else "") for number, text in enumerate(prompts(200))]
    ids = write_chats(tmp_path / "in.jsonl", asked)
    batch = stoker("submit", tmp_path / "in.jsonl", env=env).stdout.strip()
    with Command("results", batch, "--follow", env=env) as command:
        assert command.process.stdout is not None
        first = command.process.stdout.readline()
        done_then = results_in(postgres_url)
        printed = first + command.process.stdout.read()
        assert command.process.wait(30) == 0
    assert done_then < 200, "the first line came while the batch ran"
    assert ids_of(parse_lines(printed)) == ids


@pytest.mark.usefixtures("worker")
def test_doctor_finds_all_well(env: dict[str, str]) -> None:
    def leads() -> bool:
        return stoker("doctor", env=env).returncode == 0

    wait_until(leads, 15, "doctor finds everything well")
    findings = json.loads(stoker("doctor", "--json", env=env).stdout)
    assert {finding["what"].split(" ")[0] for finding in findings} >= {
        "postgres",
        "schema",
        "dispatch",
        "broker",
        "redis",
        "worker",
        "engine",
    }
    assert [finding for finding in findings if finding["remedy"]] == []


@pytest.mark.parametrize("name", REMEDIES)
def test_doctor_exits_3_for_each_service_that_is_down_and_still_checks_the_others(
    name: str, env: dict[str, str]
) -> None:
    ended = stoker("doctor", "--json", env=env | {name: REMEDIES[name]})
    assert ended.returncode == 3, ended.stderr
    down = [finding for finding in json.loads(ended.stdout) if finding["unreachable"]]
    assert len(down) == 1
    assert name in down[0]["remedy"], down
    assert str(CLOSED_PORT) in down[0]["found"] and "guest:guest" not in down[0]["found"]


def test_the_same_file_submitted_twice_is_the_same_batch_and_says_so(services: dict[str, str], tmp_path: Path) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(10))
    first = stoker("submit", tmp_path / "in.jsonl", env=services)
    again = stoker("submit", tmp_path / "in.jsonl", env=services)
    assert again.stdout == first.stdout and "within the last hour" in again.stderr
    other = stoker("submit", tmp_path / "in.jsonl", "--set", "temperature=0", env=services)
    assert other.stdout != first.stdout


@pytest.mark.usefixtures("worker")
def test_a_batch_may_come_from_standard_input(env: dict[str, str], tmp_path: Path) -> None:
    ids = write_chats(tmp_path / "in.jsonl", prompts(5))
    submitted = stoker("submit", "-", env=env, stdin=(tmp_path / "in.jsonl").read_text())
    assert submitted.returncode == 0, submitted.stderr
    assert stoker("watch", submitted.stdout.strip(), env=env).returncode == 0
    assert ids_of(parse_lines(stoker("results", submitted.stdout.strip(), env=env).stdout)) == ids


@pytest.mark.usefixtures("worker")
def test_a_model_that_no_worker_serves_is_refused_by_name_before_anything_is_stored(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(chat("a", "x") + chat("b", "y", model="gpt-unknown") + chat("c", "z"))
    refused = stoker("submit", tmp_path / "in.jsonl", env=env)
    assert refused.returncode == 2
    assert "line 2" in refused.stderr and "gpt-unknown" in refused.stderr and MODEL in refused.stderr
    assert json.loads(stoker("status", "--json", env=env).stdout) == []
    renamed = stoker("submit", tmp_path / "in.jsonl", "--model", MODEL, env=env)
    assert renamed.returncode == 0, renamed.stderr
