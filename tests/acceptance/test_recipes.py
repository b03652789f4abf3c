"""A recipe over a folder of documents in real workers: every document ends once, whatever dies in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click
import psycopg
import pytest
from click.testing import CliRunner

from pipeline.steps import STEPS_AT_ONCE
from runtime.errors import BadInput
from scripts.stoker import cli
from tests.acceptance.chats import MODEL, parse_lines
from tests.support.hostile_documents import pdf
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

SECTIONS = 24  # of the long document; a part has one or two
SHORT = 3
PART, JOIN = "Summarize this part of a longer document", "These are summaries of the parts"
MIDDLE = 8  # parts that have been asked for when the worker is killed


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A folder with one long document, some short ones, and one that is damaged."""
    folder = tmp_path / "reports"
    (folder / "old").mkdir(parents=True)
    sections = (f"## Section {n}\n\n" + f"words of section {n} and no other. " * 20 for n in range(SECTIONS))
    (folder / "long.md").write_text("\n\n".join(sections))
    for number in range(SHORT):
        (folder / "old" / f"short-{number}.txt").write_text(f"Offer {number}: three chairs for {number + 10} euros.")
    (folder / "broken.pdf").write_bytes(pdf([["never read"]])[:200])
    return folder


@pytest.fixture
def recipe_env(env: dict[str, str], endpoint: ScriptedEndpoint) -> dict[str, str]:
    """With a small window, and parts that take long. Summaries need no Chroma, and none answers."""
    endpoint.script(f"[[latency 0.6]] [[answer {'fact ' * 30}]]", match=PART)
    endpoint.script("[[answer all that is in it]]", match=JOIN)
    return env | {"STOKER_ENGINE__CONTEXT_TOKENS": "640", "STOKER_CACHE__CHROMA_URL": "http://127.0.0.1:1"}


def asked_for_parts(endpoint: ScriptedEndpoint) -> dict[str, int]:
    prompts = endpoint.calls().prompts.items()
    return {prompt: count for prompt, count in prompts if PART in prompt and JOIN not in prompt}


def test_each_document_ends_once_although_the_worker_is_killed_in_the_middle_of_the_long_one(
    recipe_env: dict[str, str], tmp_path: Path, endpoint: ScriptedEndpoint, documents: Path
) -> None:
    env = recipe_env
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        submitted = stoker(
            *("submit", "--recipe", "summarize", "--documents", documents, "--model", MODEL),
            *("--set", "max_tokens=64"),
            env=env,
        )
        assert submitted.returncode == 0, submitted.stderr
        batch = submitted.stdout.strip()
        wait_until(lambda: len(asked_for_parts(endpoint)) >= MIDDLE, 30, "the long summary is in its middle")
        for process in killed.processes():
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not killed.processes(), 5, "all of it is gone")
    before, parts_before = endpoint.calls(), len(asked_for_parts(endpoint))
    with WorkerProcess("next", env=env, folder=tmp_path):
        ended = stoker("watch", batch, env=env)
        assert ended.returncode == 1, "one of the documents is damaged"
    parts, after = asked_for_parts(endpoint), endpoint.calls()
    repeated = sum(parts.values()) - len(parts)
    print(f"\nkill -9 after {before.count} requests of {after.count}: {repeated} of {len(parts)} parts repeated")
    assert max(parts.values()) <= 2
    assert repeated <= STEPS_AT_ONCE, "what was in flight"
    assert MIDDLE <= parts_before < len(parts)
    assert all(f"words of section {number} and no other" in "\n".join(parts) for number in range(SECTIONS))
    assert sum(count for prompt, count in after.prompts.items() if "three chairs" in prompt) <= 2 * SHORT
    assert_told(batch, env, documents)


def assert_told(batch: str, env: dict[str, str], documents: Path) -> None:
    """One line for each document, in the order of their paths; the damaged one's is an error with its code."""
    answered = parse_lines(stoker("results", batch, env=env).stdout)
    assert [line["custom_id"] for line in answered] == ["long.md", *(f"old/short-{n}.txt" for n in range(SHORT))]
    [broken] = parse_lines(stoker("results", batch, "--errors", env=env).stdout)
    long, *short = answered
    assert broken["custom_id"] == "broken.pdf"
    assert broken["error"]["code"] == "corrupt_document"
    assert long["response"]["body"]["choices"][0]["message"]["content"] == "all that is in it"
    for number, line in enumerate(short):
        answer = line["response"]["body"]["choices"][0]["message"]["content"]
        assert f"Offer {number}: three chairs" in answer
    for line in (broken, *answered):
        assert line["stoker"]["recipe"] == "summarize"
        assert line["stoker"]["document"]["source"] == str(documents / line["custom_id"])


SUBMIT = ("submit", "--documents", ".", "--model", "m")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((*SUBMIT, "--recipe", "sum"), "no recipe sum; there are ask, classify, extract, index, summarize"),
        ((*SUBMIT, "--recipe", "classify"), "required field `labels` (recipe classify; its options: labels)"),
        ((*SUBMIT, "--recipe", "classify", "--labels", "a, a"), "labels: each may be there once"),
        ((*SUBMIT, "--recipe", "extract", "--schema", __file__), "test_recipes.py: is no JSON: "),
        ((*SUBMIT, "--recipe", "ask", "-c", "c"), "recipe ask needs --instruction: what is asked of each document"),
        ((*SUBMIT, "--recipe", "ask", "--instruction", "x"), "name a collection for them with --collection"),
        ((*SUBMIT, "--recipe", "ask", "--option", "top_k"), "--option top_k: write --option NAME=VALUE, such as"),
        ((*SUBMIT, "--recipe", "ask", "--option", "top_k=51"), "Expected `int` <= 50 - at `$.top_k` (recipe ask"),
    ],
)
def test_a_wrong_use_is_told_before_anything_is_read(arguments: tuple[str, ...], fault: str) -> None:
    ended = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert isinstance(ended.exception, BadInput | click.UsageError)
    assert fault in str(ended.exception)


def test_a_document_that_is_nowhere_is_refused_before_any_is_stored(
    services: dict[str, str], tmp_path: Path, documents: Path
) -> None:
    recipe = ("submit", "--recipe", "summarize", "--model", MODEL, "--documents", documents)
    ended = stoker(*recipe, "--documents", tmp_path / "nowhere.pdf", env=services)
    assert ended.returncode == 2
    assert f"{tmp_path / 'nowhere.pdf'}: no such file or folder" in ended.stderr
    with psycopg.connect(services["STOKER_POSTGRES__URL"]) as connection:
        assert connection.execute("SELECT (SELECT count(*) FROM documents), count(*) FROM batches").fetchone() == (0, 0)
