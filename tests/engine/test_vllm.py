"""Real vLLM with the W8A8 checkpoint, started by a real worker; jobs through RabbitMQ and Postgres."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
import pytest

from inference.checkpoints import digest_of
from tests.acceptance.chats import chat, ids_of, parse_lines, read_lines
from tests.engine.conftest import EngineRoom
from tests.support.processes import REPOSITORY, WorkerProcess, stoker
from tests.support.waiting import wait_until

ALIAS = "smollm2-135m"
CHECKPOINT = REPOSITORY / ".checkpoints" / "smollm2-135m-w8a8"
JOBS = 40
MIDDLE = 10
WATCH_S = 200.0

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (REPOSITORY / ".venv-vllm").exists(), reason="run `make engine-vllm`"),
    pytest.mark.skipif(not CHECKPOINT.exists(), reason="run `make checkpoint`"),
]


@pytest.fixture
def chats_file(tmp_path: Path) -> Path:
    """The first chats of the examples."""
    file = tmp_path / "in.jsonl"
    with (REPOSITORY / "examples" / "prompts.jsonl").open() as examples:
        file.write_text("".join(islice(examples, JOBS)))
    return file


def test_every_chat_gets_its_answer_and_the_manifest_says_what_gave_it(
    room: EngineRoom, chats_file: Path, tmp_path: Path
) -> None:
    room.worker()
    output = tmp_path / "out.jsonl"
    ended = stoker("run", chats_file, "-o", output, "--max-output-tokens", "24", "--json", env=room.env)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert (figures["done"], figures["failed"]) == (JOBS, 0)
    lines = read_lines(output)
    assert ids_of(lines) == ids_of(read_lines(chats_file))
    usages = [line["response"]["body"]["usage"] for line in lines]
    assert figures["tokens_out"] == sum(usage["completion_tokens"] for usage in usages) > JOBS
    assert figures["tokens_in"] == sum(usage["prompt_tokens"] for usage in usages)
    assert max(usage["completion_tokens"] for usage in usages) <= 24
    assert figures["tokens_in_cached"] > 0, "the examples share their beginnings"
    [engine] = json.loads((tmp_path / "out.manifest.json").read_text())["engines"]
    assert (engine["kind"], engine["checkpoint_digest"]) == ("vllm", digest_of(CHECKPOINT))
    assert engine["version"].startswith("0.32") and engine["quantization"] == "compressed-tensors"
    print(f"\n{JOBS} chats: {figures['seconds']} s, {figures['tokens_per_s']} tokens/s")


def test_fields_that_stoker_does_not_know_reach_vllm_untouched(room: EngineRoom, tmp_path: Path) -> None:
    room.worker()
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    lines = [
        _chat("json", "What colour has grass?", response_format=format_, temperature=0),
        _chat("logprobs", "Say yes.", logprobs=True, top_logprobs=2, max_tokens=4),
        _chat("stop", "Count from one to nine in words.", stop=["e"], ignore_eos=True, max_tokens=24),
        _chat("two", "Tell a story.", n=2, temperature=1, max_tokens=8),
        _chat("seed", "Tell a story.", seed=7, temperature=1, max_tokens=8),
        _chat("seed again", "Tell a story.", seed=7, temperature=1, max_tokens=8),
    ]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    ended = stoker("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", env=room.env)
    assert ended.returncode == 0, ended.stderr
    choices = {line["custom_id"]: line["response"]["body"]["choices"] for line in read_lines(tmp_path / "out.jsonl")}
    assert json.loads(_text(choices["json"]))["color"] in {"red", "green"}
    logprobs = choices["logprobs"][0]["logprobs"]["content"]
    assert logprobs and all(len(token["top_logprobs"]) == 2 for token in logprobs)
    assert choices["stop"][0]["stop_reason"] == "e" and "e" not in _text(choices["stop"])
    assert len(choices["two"]) == 2
    assert _text(choices["seed"]) == _text(choices["seed again"])


def test_a_killed_worker_takes_its_engine_along_and_the_next_one_ends_the_batch(
    room: EngineRoom, chats_file: Path
) -> None:
    killed = room.worker()
    submitted = stoker(
        "submit",
        chats_file,
        "--max-output-tokens",
        "48",
        "--set",
        "max_tokens=48",
        "--set",
        "ignore_eos=true",
        env=room.env,
    )
    batch = submitted.stdout.strip()
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: _results_in(room, batch) >= MIDDLE, 120, "the batch is in its middle")
    assert [process for process in killed.processes() if "vllm" in process.command.lower()]
    killed.kill9()
    wait_until(lambda: not killed.processes(), 15, "nothing of the killed worker runs, no vLLM either")
    written = _results_in(room, batch)
    before = _requests(room.engine_log(killed), batch)
    assert written < JOBS
    following = room.worker()
    watched = stoker("watch", batch, env=room.env, timeout_s=WATCH_S)
    assert watched.returncode == 0, watched.stderr
    lines = parse_lines(stoker("results", batch, env=room.env).stdout)
    assert ids_of(lines) == ids_of(read_lines(chats_file))
    after = _requests(room.engine_log(following), batch)
    twice = len(before) + len(after) - JOBS
    print(
        f"\nkill -9 of a worker with vLLM: {written} of {JOBS} written, {twice} jobs ran twice "
        f"(requests in the engines' logs: {len(before)} + {len(after)})"
    )
    assert 0 <= twice <= len(before) - written


def _chat(custom_id: str, prompt: str, **fields: Any) -> str:
    return chat(custom_id, prompt, model=ALIAS, **({"max_tokens": 24} | fields))


def _text(choices: list[dict[str, Any]]) -> str:
    return str(choices[0]["message"]["content"])


def _requests(engine_log: str, batch: str) -> list[int]:
    """The jobs that an engine was asked to run, by the ids in its log."""
    name = batch.replace("batch_", "batch_req_")
    return [int(seq) for seq in re.findall(rf"Received request \S*?{name}_(\d+)", engine_log)]


def _results_in(room: EngineRoom, batch: str) -> int:
    with psycopg.connect(room.postgres_url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM results WHERE batch_id = %s", [batch.removeprefix("batch_")]
        ).fetchone()
    assert row is not None
    return int(row[0])


RECIPES = {
    "summarize": ("--set", "max_tokens=48"),
    "classify": ("--labels", "ship,recipe"),
    "extract": ("--schema", "{schema}"),
    "ask": ("-c", "ships", "--instruction", "Who feeds the furnace?", "--set", "max_tokens=24"),
}
SCHEMA = {
    "type": "object",
    "properties": {"ship": {"enum": ["Albatross", "Bellerophon"]}, "is_steamer": {"type": "boolean"}},
    "required": ["ship", "is_steamer"],
    "additionalProperties": False,
}
SHIPS = {"Albatross": 2, "Bellerophon": 120}  # sentences; the second does not fit into the window


def test_recipes_conversations_and_passages_are_answered(room: EngineRoom, tmp_path: Path) -> None:
    worker = room.worker()
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, sentences in SHIPS.items():
        text = " ".join(f"The {name} burns coal, and {count} stokers feed it." for count in range(sentences))
        (folder / f"{name}.md").write_text(f"# The steamer {name}\n\n{text}\n")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    told: dict[str, list[dict[str, Any]]] = {}
    with WorkerProcess("reader", env=room.env | {"STOKER_WORKER__NODE": "documents"}, folder=tmp_path):
        for recipe, words in RECIPES.items():
            options = [word.format(schema=tmp_path / "schema.json") for word in words]
            output = tmp_path / f"{recipe}.jsonl"
            ended = stoker("run", "--recipe", recipe, "--documents", folder, *options, "-o", output, env=room.env)
            assert ended.returncode == 0, ended.stderr
            told[recipe] = read_lines(output)
            assert ids_of(told[recipe]) == [f"{name}.md" for name in SHIPS]
            assert all(answer_of(line) for line in told[recipe])
    assert len(re.findall(r"part-0-\d+-\w+-", room.engine_log(worker))) > 1, "the long one was read in parts"
    assert {line["stoker"]["label"] for line in told["classify"]} <= {"ship", "recipe"}
    assert [set(json.loads(answer_of(line))) for line in told["extract"]] == [{"ship", "is_steamer"}] * 2
    for name, line in zip(SHIPS, told["ask"], strict=True):
        assert {Path(passage["source"]).stem for passage in line["stoker"]["passages"]} == {name}
    _converse(room, tmp_path)


def _converse(room: EngineRoom, folder: Path) -> None:
    """A conversation, and a question to the collection."""
    lines = [json.loads(chat(f"id-{seq}", "What burns coal?", model=ALIAS, max_tokens=16)) for seq in range(2)]
    lines[0]["stoker"] = {"turns": ["And who feeds it?", "Why?"]}
    lines[1]["stoker"] = {"collection": "ships", "query": "the Bellerophon", "top_k": 2}
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = stoker("run", folder / "in.jsonl", "-o", folder / "out.jsonl", env=room.env)
    assert ended.returncode == 0, ended.stderr
    spoken, found = (line["stoker"] for line in read_lines(folder / "out.jsonl"))
    roles = [message["role"] for message in spoken["conversation"]["messages"]]
    assert roles == ["user", "user", "assistant", "user", "assistant"]
    assert {Path(passage["source"]).stem for passage in found["passages"]} == {"Bellerophon"}


def answer_of(line: dict[str, Any]) -> str:
    """What the engine said."""
    return str(line["response"]["body"]["choices"][0]["message"]["content"])
