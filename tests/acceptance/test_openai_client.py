"""The official client, unchanged, against a gateway and a worker as they run in production."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import openai
import pytest
from openai.types import Batch

from models.states import Scope
from pipeline.keys import issue_key
from store.database import Database
from store.presence import PresenceBoard, WorkerPresence
from tests.support.answer_lost import AnswerLost
from tests.support.batches import execute, rows
from tests.support.gateway_process import GatewayProcess
from tests.support.processes import marked
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

CHAT: Final = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
MODEL = "scripted"


def line(number: int, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": f"id-{number}", "method": "POST", "url": CHAT, "body": body, **more}


def jsonl(*lines: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO("".join(json.dumps(one) + "\n" for one in lines).encode())
    file.name = "requests.jsonl"
    return file


@pytest.fixture
def gateway(env: dict[str, str], tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway with one validator, and limits on batches that no test but one meets."""
    limits = {"STOKER_GATEWAY__BATCH_LINES": "100", "STOKER_GATEWAY__BATCH_TOKENS": "100000"}
    with GatewayProcess(env=env | limits, folder=tmp_path) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayProcess, database: Database) -> Iterator[openai.OpenAI]:
    """The client as a program makes it: an address and a key."""
    with database.transaction() as session:
        key = issue_key(session, tenant="local", name="program", scopes=(Scope.SUBMIT, Scope.READ)).key
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key.text) as made:
        yield made


def submit(client: openai.OpenAI, *lines: dict[str, Any], **options: Any) -> Batch:
    file = client.files.create(file=jsonl(*lines), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **options)


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch_id).status in ENDED, 60, f"{batch_id} ends")
    return client.batches.retrieve(batch_id)


@pytest.mark.usefixtures("worker")
def test_the_official_client_uploads_creates_polls_lists_and_downloads(client: openai.OpenAI, tmp_path: Path) -> None:
    lines = [line(number, f"question {number}") for number in range(60)]
    lines[7] = line(7, "bad [[status 400]]")
    file = client.files.create(file=jsonl(*lines), purpose="batch")
    assert client.files.retrieve(file.id) == file and file.purpose == "batch"
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"team": "search"}
    )
    assert batch.status == "validating"
    done = ended(client, batch.id)
    assert done.status == "completed" and done.request_counts is not None and done.usage is not None
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (60, 59, 1)
    assert done.metadata == {"team": "search"} and done.usage.total_tokens > 0
    assert done.in_progress_at and done.finalizing_at and done.completed_at and done.expires_at

    assert done.output_file_id is not None and done.error_file_id is not None
    output = [json.loads(text) for text in client.files.content(done.output_file_id).iter_lines()]
    assert [one["custom_id"] for one in output] == [f"id-{number}" for number in range(60) if number != 7]
    assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == "echo: question 0"
    assert all(one["error"] is None and one["response"]["status_code"] == 200 for one in output)
    [error] = [json.loads(text) for text in client.files.content(done.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["error"], error["response"]["status_code"]) == ("id-7", None, 400)
    client.files.content(done.output_file_id).write_to_file(tmp_path / "out.jsonl")
    shown = client.files.wait_for_processing(done.output_file_id, poll_interval=0.2)
    assert (shown.purpose, shown.bytes) == ("batch_output", (tmp_path / "out.jsonl").stat().st_size)

    more = [submit(client, line(number, f"more {number}")).id for number in range(3)]
    assert [one.id for one in client.batches.list(limit=2)] == [*reversed(more), batch.id], "paged by the client"
    assert {one.id for one in client.files.list(purpose="batch", limit=2)} >= {file.id}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    for one in more:
        assert ended(client, one).status == "completed"
    fetched = subprocess.run(
        ["curl", "-sS", "-H", f"Authorization: Bearer {client.api_key}", f"{client.base_url}batches/{batch.id}"],
        capture_output=True,
        check=True,
    )
    assert json.loads(fetched.stdout)["status"] == "completed", "and curl"


@pytest.mark.usefixtures("worker")
def test_what_has_ended_is_there_while_the_batch_runs_and_what_a_cancel_leaves_stays(
    client: openai.OpenAI, endpoint: ScriptedEndpoint
) -> None:
    lines = [line(number, f"quick {number}") for number in range(20)]
    lines += [line(number, f"slow {number} [[latency 4]]") for number in range(20, 80)]
    batch = submit(client, *lines, extra_body={"stoker": {"order": "file"}})
    extras = batch.model_extra["stoker"]  # type: ignore[index]
    assert batch.output_file_id is None, "not before it has ended"
    part = client.files.with_raw_response.content
    wait_until(lambda: part(extras["output_file_id"]).content.count(b"\n") == 20, 30, "the quick ones have ended")
    partial = part(extras["output_file_id"])
    assert (partial.headers["x-incomplete"], partial.headers["x-last-line"]) == ("true", "20")
    rest = part(extras["output_file_id"], extra_query={"after_line": 18})
    assert [json.loads(text)["custom_id"] for text in rest.text.splitlines()] == ["id-18", "id-19"]
    assert client.batches.cancel(batch.id).status == "cancelling"
    cancelled = ended(client, batch.id)
    counts = cancelled.request_counts
    assert counts is not None and cancelled.status == "cancelled"
    assert 20 <= counts.completed < 80, "what was in flight may end"
    assert cancelled.cancelling_at and cancelled.cancelled_at and cancelled.completed_at is None
    complete = part(cancelled.output_file_id or "")
    assert complete.content.startswith(partial.content) and "x-incomplete" not in complete.headers
    errors = [json.loads(text) for text in client.files.content(cancelled.error_file_id or "").text.splitlines()]
    assert {(one["response"], one["error"]["code"]) for one in errors} == {(None, "batch_cancelled")}
    assert len(errors) == 80 - counts.completed
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_a_file_that_is_wrong_turns_its_batch_failed_with_the_code_and_the_line(
    client: openai.OpenAI, redis_url: str
) -> None:
    board = PresenceBoard(redis_url)
    board.announce(WorkerPresence(name="w", children=1, models=[MODEL], engine="e", healthy=True))
    board.close()
    wrong: dict[tuple[str, int | None], bytes] = {
        ("invalid_json_line", 1): b"{",
        ("duplicate_custom_id", 2): jsonl(line(1, "a"), line(1, "b")).getvalue(),
        ("missing_custom_id", 1): jsonl({"method": "POST", "url": CHAT, "body": {}}).getvalue(),
        ("url_mismatch", 1): jsonl(line(1, "a") | {"url": "/v1/embeddings"}).getvalue(),
        ("model_not_found", 1): jsonl(
            line(1, "a") | {"body": {"model": "x", "messages": [{"role": "user"}]}}
        ).getvalue(),
        ("empty_file", None): b"",
        ("too_many_tasks", None): jsonl(*(line(number, "a") for number in range(101))).getvalue(),
        ("invalid_request", 1): jsonl(line(1, "a") | {"method": "GET"}).getvalue(),
        ("token_limit_exceeded", None): jsonl(line(1, "a" * 500_000)).getvalue(),
    }
    batches = {}
    for expected, content in wrong.items():
        file = client.files.create(file=("wrong.jsonl", content), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        batches[expected] = made.id
    for (code, number), batch_id in batches.items():
        failed = ended(client, batch_id)
        assert failed.status == "failed" and failed.errors is not None and failed.errors.data is not None
        assert (failed.errors.data[0].code, failed.errors.data[0].line) == (code, number)
        assert failed.output_file_id is None and failed.error_file_id is None


def test_a_creation_whose_answer_was_lost_is_repeated_by_the_client_and_makes_one_batch(
    client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    file = client.files.create(file=jsonl(line(1, "a")), purpose="batch")
    with AnswerLost(gateway.port) as between:
        again = client.with_options(base_url=f"http://127.0.0.1:{between.port}/v1", max_retries=2)
        made = again.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert between.lost == 1
    assert [one.id for one in client.batches.list()] == [made.id]


def test_a_killed_validator_leaves_a_batch_that_the_next_one_validates(
    client: openai.OpenAI, gateway: GatewayProcess, database: Database
) -> None:
    validators = [process for process in marked(gateway.mark) if "api.validator" in process.command]
    for process in validators:
        os.kill(process.pid, signal.SIGSTOP)
    batch = submit(client, line(1, "a"))
    for process in validators:
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", 30, "another validator took it")
    held = rows(database, "SELECT fence FROM batches")
    execute(database, "UPDATE batches SET state = 'validating', lease_until = now(), ending = NULL")
    wait_until(lambda: rows(database, "SELECT state FROM batches") == [("in_progress",)], 30, "taken over")
    assert rows(database, "SELECT fence FROM batches") == [(held[0][0] + 1,)]
    assert rows(database, "SELECT count(*) FROM jobs") == [(1,)]


def test_an_upload_takes_flat_memory_and_a_killed_gateway_keeps_what_it_answered(
    client: openai.OpenAI, gateway: GatewayProcess, env: dict[str, str], tmp_path: Path
) -> None:
    megabytes = 192
    big = tmp_path / "big.bin"
    with big.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1024) * 1024)
    before = _peak_bytes(gateway.process.pid)
    with big.open("rb") as file:
        made = client.files.create(file=file, purpose="user_data")
    client.files.content(made.id).write_to_file(tmp_path / "back.bin")
    assert _peak_bytes(gateway.process.pid) - before < 48 * 1024 * 1024
    assert subprocess.run(["cmp", big, tmp_path / "back.bin"], check=False).returncode == 0
    gateway.process.kill()
    gateway.process.wait()
    with GatewayProcess(env=env, folder=tmp_path) as again:
        assert client.with_options(base_url=f"{again.url}/v1").files.retrieve(made.id) == made
        again.process.terminate()
        assert again.process.wait(30) == 0
        wait_until(lambda: not marked(again.mark), 15, "its validator ended with it")


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
