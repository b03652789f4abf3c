"""The services used as a user uses them, and their power cut in the middle of a batch."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import openai

from tests.compose.project import FOLDER, Project
from tests.support.waiting import wait_until

GATEWAY = "http://127.0.0.1:8080"
ANSWER_S = 300.0
BACK_S = 300.0
COPIES = 8  # of the lines, so that the cut is in the middle
SLOW_S = 120.0

Step = dict[str, Any]


def use(made: Project) -> list[Step]:
    """What a user does with everything up, step by step: what, how it went, the seconds."""
    return [
        step_of("`cli doctor` finds all well", lambda: _doctor(made)),
        step_of("`cli submit` of 64 prompts, `cli results`: each line has one answer", lambda: _batch(made)),
        step_of(
            "a key by `cli keys create`; a file, a batch and a single request by openai's client at the published port",
            lambda: _gateway(made),
        ),
        step_of("the gateway refuses who has no key", lambda: _status(f"{GATEWAY}/v1/batches") == 401),
        step_of("Flower asks for its password, and lets in who has it", lambda: _flower(made)),
        step_of("Prometheus finds every target up", _targets),
        step_of("all queues are quorum queues, with their delivery limit and dead letter queue", lambda: _queues(made)),
        step_of("Redis appends to its file", lambda: _redis(made)),
    ]


def cut_power(made: Project, names: Iterable[str]) -> list[Step]:
    """kill -9 of every container at once while a batch runs: all come back by themselves, and it ends."""
    before = {name: made.container(name) for name in names}
    prompts = _repeated(COPIES)
    batch = submitted(made, "--set", "max_tokens=96", "--cache", "off", prompts=prompts)
    wait_until(lambda: done_of(made, batch) > 0, ANSWER_S, "the first results")
    done = done_of(made, batch)
    for container in before.values():
        os.kill(container["State"]["Pid"], signal.SIGKILL)
    jobs = len(prompts.splitlines())
    return [
        step_of(
            f"kill -9 of all {len(before)} containers at {done} of {jobs} jobs: each is restarted and healthy again",
            lambda: _are_back(made, before),
        ),
        step_of(
            "the batch that ran then ends, each line with one answer", lambda: is_whole(made, batch, prompts=prompts)
        ),
    ]


def _repeated(times: int) -> bytes:
    lines = [json.loads(line) for line in prompts_of().splitlines()]
    return b"".join(
        json.dumps({**line, "custom_id": f"{copy}-{line['custom_id']}"}).encode() + b"\n"
        for copy in range(times)
        for line in lines
    )


def prompts_of() -> bytes:
    """The lines that users try it with."""
    return (FOLDER / "examples" / "prompts.jsonl").read_bytes()


def step_of(what: str, shows: Callable[[], object]) -> Step:
    """Do it: how it went. What it shows is a text for the report, or whether it is so; it may raise as tests do."""
    began = time.monotonic()
    try:
        outcome = shows()
    except (AssertionError, OSError, ValueError, KeyError) as error:
        outcome, said = False, f"{type(error).__name__}: {error}"
    else:
        said = outcome if isinstance(outcome, str) else ""
    step = {"what": what, "is_well": bool(outcome), "said": said, "seconds": round(time.monotonic() - began, 1)}
    print(f"{'ok' if step['is_well'] else '!!'} {step['seconds']:6.1f} s  {what}  {said}", flush=True)
    return step


def _doctor(made: Project) -> str:
    done = made.cli("doctor", "--json")
    faults = [found for found in json.loads(done.stdout) if found["remedy"]]
    assert not faults, faults
    return f"{len(json.loads(done.stdout))} findings"


def submitted(made: Project, *options: str, prompts: bytes | None = None) -> str:
    """The id of a batch of these lines, of examples/prompts.jsonl by default."""
    done = made.cli("submit", "-", *options, stdin=prompts_of() if prompts is None else prompts)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split()[-1]


def _batch(made: Project) -> str:
    return is_whole(made, submitted(made))


def done_of(made: Project, batch: str) -> int:
    """How many of its jobs have a result, asked of Postgres itself, which is quicker than the command."""
    asked = f"SELECT coalesce(sum(done), 0) FROM shards WHERE batch_id = '{batch.removeprefix('batch_')}'"
    login = 'PGPASSWORD="$POSTGRES_PASSWORD" psql -h 127.0.0.1 -U stoker -Atc "$0"'
    return int(made("exec", "-T", "postgres", "sh", "-c", login, asked))


def is_whole(made: Project, batch: str, *, prompts: bytes | None = None) -> str:
    """Wait for its end; AssertionError unless each line has one answer."""
    watched = made.cli("watch", batch)
    assert watched.returncode == 0, watched.stderr.decode()[-500:]
    lines = [json.loads(line) for line in made.cli("results", batch).stdout.splitlines()]
    asked = [json.loads(line)["custom_id"] for line in (prompts_of() if prompts is None else prompts).splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(asked)
    assert all(line["response"]["status_code"] == 200 for line in lines)
    return f"{len(lines)} answers"


def _gateway(made: Project) -> str:
    key = made.cli("keys", "create", "--scope", "admin").stdout.decode().split()[-1]
    client = openai.OpenAI(base_url=f"{GATEWAY}/v1", api_key=key, timeout=SLOW_S)
    prompts = prompts_of()
    file = client.files.create(file=("prompts.jsonl", prompts), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", ANSWER_S, "the batch's end")
    ended = client.batches.retrieve(batch.id)
    assert ended.output_file_id is not None
    lines = client.files.content(ended.output_file_id).text.splitlines()
    assert len(lines) == len(prompts.splitlines())
    model = client.models.list().data[0].id
    said = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=8
    )
    return f"{len(lines)} answers; a single request of {model}: {said.choices[0].message.content!r}"


def _flower(made: Project) -> bool:
    login = base64.b64encode(f"stoker:{made.password('FLOWER_PASSWORD')}".encode()).decode()
    url = "http://127.0.0.1:5555/workers"
    return (_status(url), _status(url, f"Basic {login}")) == (401, 200)


def _targets() -> str:
    targets: list[dict[str, Any]] = []

    def are_up() -> bool:
        with urllib.request.urlopen("http://127.0.0.1:9090/api/v1/targets", timeout=10) as answer:
            targets[:] = json.loads(answer.read())["data"]["activeTargets"]
        return bool(targets) and all(target["health"] == "up" for target in targets)

    try:
        wait_until(are_up, SLOW_S, "all up")
    except AssertionError as error:
        raise AssertionError([(one["scrapeUrl"], one["health"], one["lastError"]) for one in targets]) from error
    return f"{len(targets)} targets of {', '.join(sorted({target['labels']['job'] for target in targets}))}"


def _queues(made: Project) -> str:
    said = made(
        "exec",
        "-T",
        "rabbitmq",
        "rabbitmqctl",
        "-q",
        "list_queues",
        "-p",
        "stoker",
        "--formatter",
        "json",
        "name",
        "type",
        "durable",
        "policy",
        "arguments",
    )
    queues = [queue for queue in json.loads(said) if queue["durable"]]
    others = [
        queue["name"]
        for queue in queues
        if not str(queue["type"]).endswith("quorum_queue") and queue["type"] != "quorum"
    ]
    assert queues and not others, others
    return ", ".join(sorted(queue["name"] for queue in queues))


def _redis(made: Project) -> bool:
    shown = made("exec", "-T", "redis", "sh", "-c", 'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli info persistence')
    return "aof_enabled:1" in shown and "aof_last_write_status:ok" in shown


def _are_back(made: Project, before: dict[str, dict[str, Any]]) -> str:
    def is_back(name: str) -> bool:
        state = made.container(name)["State"]
        is_new = state["StartedAt"] != before[name]["State"]["StartedAt"]
        return bool(is_new and state["Running"] and state.get("Health", {}).get("Status", "healthy") == "healthy")

    missing = set(before)

    def all_are() -> bool:
        missing.difference_update([name for name in missing if is_back(name)])
        return not missing

    began = time.monotonic()
    try:
        wait_until(all_are, BACK_S, "all back")
    except AssertionError as error:
        raise AssertionError(f"not back: {sorted(missing)}") from error
    return f"after {time.monotonic() - began:.0f} s"


def _status(url: str, login: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": login} if login else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
