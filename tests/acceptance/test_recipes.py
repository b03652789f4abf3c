"""A recipe over a folder of documents in real workers: every document ends once, whatever dies in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.acceptance.chats import MODEL, parse_lines
from tests.support.hostile_documents import pdf
from tests.support.processes import WorkerProcess, stoker
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until

SECTIONS = 40  # of the long document; a part has one or two
SHORT = 3
PART, JOIN = "Summarize this part of a longer document", "These are summaries of the parts"
MIDDLE = 10  # parts that have been asked for when the worker is killed


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
    endpoint.script(f"[[latency 0.4]] [[answer {'fact ' * 30}]]", match=PART)
    endpoint.script("[[answer all that is in it]]", match=JOIN)
    return env | {"STOKER_ENGINE__CONTEXT_TOKENS": "640", "STOKER_CACHE__CHROMA_URL": "http://127.0.0.1:1"}


def asked_for_parts(endpoint: ScriptedEndpoint) -> dict[str, int]:
    return {prompt: count for prompt, count in endpoint.calls().prompts.items() if PART in prompt}


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
    before = endpoint.calls()
    with WorkerProcess("next", env=env, folder=tmp_path):
        ended = stoker("watch", batch, env=env)
        assert ended.returncode == 1, "one of the documents is damaged"
    prompts = endpoint.calls().prompts
    repeated = {prompt: count - 1 for prompt, count in prompts.items() if count > 1}
    parts = len(asked_for_parts(endpoint))
    print(f"\nkill -9 after {before.count} requests of {sum(prompts.values())}: {sum(repeated.values())} repeated")
    assert max(repeated.values(), default=0) <= 1
    assert sum(repeated.values()) <= 4, "what was in flight: four steps of one job at most"
    assert MIDDLE <= before.count < parts
    assert_told(batch, env, documents)
    asked = "\n".join(prompts)
    assert all(f"words of section {number} and no other" in asked for number in range(SECTIONS))


def assert_told(batch: str, env: dict[str, str], documents: Path) -> None:
    """One line for each document, in the order of their paths; the damaged one's is an error with its code."""
    lines = parse_lines(stoker("results", batch, env=env).stdout)
    assert [line["custom_id"] for line in lines] == ["broken.pdf", "long.md", *(f"old/short-{n}.txt" for n in range(3))]
    broken, long, *short = lines
    assert broken["error"]["code"] == "corrupt_document"
    assert long["response"]["body"]["choices"][0]["message"]["content"] == "all that is in it"
    for number, line in enumerate(short):
        answer = line["response"]["body"]["choices"][0]["message"]["content"]
        assert f"Offer {number}: three chairs" in answer
    for line in lines:
        assert line["stoker"]["recipe"] == "summarize"
        assert line["stoker"]["document"]["source"] == str(documents / line["custom_id"])
