"""stoker_client against a gateway and a worker as they run in production: every kind of rows, every kind of answer."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import nbclient
import nbformat
import pandas
import polars
import pyarrow
import pytest
import stoker_client
from pydantic import BaseModel
from stoker_client import Answer, BadInput, BatchFailed, JobsFailed, Refused

from models.names import batch_hex
from tests.client.conftest import FILE_BYTES, Served
from tests.support.batches import execute
from tests.support.batches import rows as rows_of
from tests.support.processes import REPOSITORY
from tests.support.waiting import wait_until

RESULTS: Final = ["answer", "error", "prompt_tokens", "completion_tokens", "source"]
PERSON: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "size": {"type": ["number", "null"]},
        "is_new": {"type": "boolean"},
        "tags": {"type": "object"},
    },
    "required": ["name", "age"],
}
SAID: Final = '{"name":"Ada","age":36,"size":1.5,"is_new":true,"tags":{"a":1}}'


class Person(BaseModel):
    """What is asked for as an object."""

    name: str
    age: int


def test_a_pandas_frame_comes_back_as_it_was_with_typed_results(named: Served) -> None:
    frame = pandas.DataFrame(
        {"text": ["one", "two", "bad [[status 400]]"], "n": [1, 2, 3], "when": pandas.to_datetime(["2026-01-02"] * 3)},
        index=pandas.Index(["x", "y", "x"], name="id"),
    )
    before = frame.copy()
    found = stoker_client.run(frame, prompt="{n}: {text} {when}", progress=False)
    pandas.testing.assert_frame_equal(frame, before)
    pandas.testing.assert_frame_equal(found[list(frame.columns)], before)
    assert list(found.columns) == [*frame.columns, *RESULTS]
    assert {name: str(found[name].dtype) for name in RESULTS} == {
        "answer": "string",
        "error": "string",
        "prompt_tokens": "Int64",
        "completion_tokens": "Int64",
        "source": "string",
    }
    assert list(found["answer"][:2]) == ["echo: 1: one 2026-01-02T00:00:00", "echo: 2: two 2026-01-02T00:00:00"]
    assert found["error"].isna().tolist() == [True, True, False]
    assert found["error"].iloc[2] == "ScriptedError: as the script says"
    assert found["completion_tokens"].tolist() == [4, 4, 0] and found["prompt_tokens"].iloc[2] == 0
    assert found["source"].tolist() == ["engine"] * 3


def test_polars_arrow_and_lists_come_back_as_their_own_kind(named: Served) -> None:
    columns: dict[str, list[Any]] = {"text": ["ä", "b"], "of": [[1, 2], None], "at": [1.5, 2.0]}
    prompt = "{text} {at} {not a slot} {{text}}"
    expected = ["echo: ä 1.5 {not a slot} {ä}", "echo: b 2.0 {not a slot} {b}"]
    lazy = stoker_client.run(polars.LazyFrame(columns), prompt=prompt, progress=False)
    assert isinstance(lazy, polars.DataFrame) and lazy["answer"].to_list() == expected
    assert lazy.drop(RESULTS).equals(polars.DataFrame(columns))
    assert lazy.schema["prompt_tokens"] == polars.Int64 and lazy.schema["error"] == polars.String
    table = pyarrow.table(columns)
    arrow = stoker_client.run(table, prompt=prompt, progress=False)
    assert arrow.select(table.column_names).equals(table)
    assert arrow.column("answer").to_pylist() == expected and arrow.column("answer").type == pyarrow.string()
    assert arrow.column("prompt_tokens").type == pyarrow.int64()
    rows = polars.DataFrame(columns).to_dicts()
    assert [one.text for one in stoker_client.run(rows, prompt=prompt, progress=False)] == expected
    [answer, _] = stoker_client.run(["hello you", "b"], progress=False)
    assert answer == Answer(1, "echo: hello you", "echo: hello you", None, 2, 3, "engine", "row-1")
    [answer] = stoker_client.run(["you"], prompt="hello {name}", system="Be kind.", progress=False)
    assert (answer.text, answer.prompt_tokens) == ("echo: hello you", 4), "with the system message's"


def test_labels_regexes_and_schemas_are_columns_and_values(named: Served) -> None:
    rows = ['[[answer {"label":"bug"}]]', "no label at all"]
    labelled, wrong = stoker_client.run(rows, labels=["bug", "praise"], progress=False)
    assert (labelled.text, labelled.value, labelled.error) == ("bug", "bug", None)
    assert wrong.text is None and wrong.error is not None and wrong.error.startswith("invalid_answer: ")
    assert wrong.prompt_tokens > 2 * labelled.prompt_tokens > 0, "it was asked twice"
    [matched] = stoker_client.run(['[[answer {"answer":"É-17"}]]'], regex=r"\p{Lu}-\d+", progress=False)
    assert matched.value == "É-17", "in the language of the gateway's expressions, which Python's has not"
    frame = polars.DataFrame({"text": [f"[[answer {SAID}]]", "none"]})
    found = stoker_client.run(frame, prompt="{text}", schema=PERSON, result_prefix="llm_", progress=False)
    parts = {"llm_name": "Ada", "llm_age": 36, "llm_size": 1.5, "llm_is_new": True, "llm_tags": '{"a":1}'}
    assert found.columns == ["text", "llm_answer", *parts, *(f"llm_{name}" for name in RESULTS[1:])]
    assert found.select(list(parts)).row(0, named=True) == parts and found["llm_answer"][0] == SAID
    assert found.select(list(parts)).row(1) == (None,) * 5
    assert [str(found.schema[name]) for name in parts] == ["String", "Int64", "Float64", "Boolean", "String"]
    [person] = stoker_client.run(['[[answer {"name":"Ada","age":36}]]'], schema=Person, progress=False)
    assert person.value == Person(name="Ada", age=36)


def test_nulls_are_refused_or_skipped_before_anything_is_sent(named: Served) -> None:
    mark = uuid4().hex  # other tests' batches go on at the same engine
    frame = pandas.DataFrame({"text": [f"{mark} a", None, f"{mark} c", None], "n": [1.0, 2.0, float("nan"), 4.0]})
    with pytest.raises(BadInput, match=r"text is null in 2 rows \(2, 4\); n is null in 1 row \(3\); fill or drop"):
        stoker_client.run(frame, prompt="{text} {n}", base_url="http://127.0.0.1:9", api_key="sk-none")
    found = stoker_client.run(frame, prompt="{text} {n}", skip_nulls=True, errors="raise", progress=False)
    assert found["answer"].isna().tolist() == [False, True, True, True]
    assert found["error"].iloc[2] == "null: the column n has no value in this row"
    assert found["prompt_tokens"].isna().tolist() == [False, True, True, True]
    assert [prompt for prompt in named.endpoint.calls().prompts if mark in prompt] == [f"{mark} a 1.0"]


def test_errors_can_be_raised_with_the_results_in_hand(named: Served) -> None:
    rows = ["fine", "bad [[status 400]]", "quiet [[empty]]", "long long long"]
    with pytest.raises(JobsFailed, match="3 of 4 rows have no good answer") as raised:
        stoker_client.run(rows, errors="raise", max_output_tokens=3, progress=False)
    assert raised.value.failed == 3 and "row 2: " in str(raised.value)
    assert [one.text for one in raised.value.results] == ["echo: fine", None, "", "echo: long long"]
    assert raised.value.results[3].error.startswith("truncated: ")


@pytest.mark.parametrize(
    ("cache", "remedy", "asked_in_all"),
    [(None, "resume=False it asks them again", (2, 1)), ("off", 'all rows again, since cache is "off"', (2, 2))],
)
def test_failed_rows_are_asked_again_by_a_new_batch_only(
    named: Served, cache: Any, remedy: str, asked_in_all: tuple[int, int]
) -> None:
    rows = [f"ill until noon, cache {cache}", f"well all day, cache {cache}"]
    named.endpoint.script("[[status 400]]", match=rows[0])
    for _ in range(2):
        with pytest.raises(JobsFailed, match=f"The same call gives the same again; with .*{remedy}"):
            stoker_client.run(rows, cache=cache, errors="raise", progress=False)
        named.endpoint.script("", match=rows[0])
    found = stoker_client.run(rows, cache=cache, errors="raise", resume=False, progress=False)
    assert [one.text for one in found] == [f"echo: {row}" for row in rows]
    prompts = named.endpoint.calls().prompts
    assert tuple(prompts[row] for row in rows) == asked_in_all


def test_what_validation_finds_is_told_by_row_or_of_the_argument(named: Served) -> None:
    rows = [None, *(f"question {number}" for number in range(30))]
    with pytest.raises(BatchFailed, match=r"run again:\n  all rows: regex: the pattern .*look-around") as raised:
        stoker_client.run(rows, regex="(?=x)x", skip_nulls=True, progress=False)
    assert [problem.row for problem in raised.value.problems] == [None] and "more" not in str(raised.value)
    with pytest.raises(BatchFailed, match=r"all rows: schema: .*'thing' is not valid") as wrong:
        stoker_client.run(rows[1:], schema={"type": "object", "properties": {"a": {"type": "thing"}}}, progress=False)
    assert len(wrong.value.problems) == 1
    with pytest.raises(BatchFailed, match=r"again:\n  all rows: temperature: is 9.0; .*\]$"):
        stoker_client.run(rows[1:], temperature=9.0, progress=False)
    with pytest.raises(BatchFailed, match=r"all rows: model: .*model_not_found"):
        stoker_client.run(["a"], model="another", progress=False)


def test_what_the_gateway_refuses_is_raised_with_its_words_and_without_the_key(named: Served) -> None:
    with pytest.raises(Refused, match="pass fewer rows at once") as raised:
        stoker_client.run([f"{number} " * 20_000 for number in range(FILE_BYTES // 20_000)], progress=False)
    assert raised.value.status_code == 413
    with pytest.raises(Refused, match="check api_key") as wrong:
        stoker_client.run(["a"], api_key="sk-wrong-key", progress=False)
    assert "sk-wrong" not in str(wrong.value)
    with pytest.raises(Refused, match="budget_tokens"):
        stoker_client.run(["a"], budget_tokens=2**60, progress=False)


def test_semantic_runs_state_template_and_variables(named: Served) -> None:
    long = "Say it again, please. " * 30 + "{text} {text} {n}"
    rows = [{"text": "some words", "n": 1}, {"text": "other words", "n": 2}]
    for prompt in ("Repeat: {text} of {n}", long):
        batch = stoker_client.submit(rows, prompt=prompt, cache="semantic", progress=False)
        found = batch.results()
        assert all(one.error is None for one in found), found
        of_it = {"id": UUID(batch_hex(batch.id))}
        [(mode,)] = rows_of(named.database, "SELECT options ->> 'cache' FROM batches WHERE id = :id", **of_it)
        stated = rows_of(named.database, "SELECT stoker FROM jobs WHERE batch_id = :id ORDER BY seq", **of_it)
        settings = [json.loads(one) for (one,) in stated]
        assert mode == "semantic" and {one["template"] for one in settings} == {prompt}
        assert [one["variables"] for one in settings] == [
            {"text": "some words", "n": "1"},
            {"text": "other words", "n": "2"},
        ]


def test_the_same_rows_are_the_same_batch_until_it_is_cancelled(
    named: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{uuid4()} [[latency 2]]", f"{uuid4()}"]
    first = stoker_client.submit(rows, progress=False)
    again = stoker_client.submit(rows)
    assert again.id == first.id and f"{first.id} has these rows already" in capsys.readouterr().err
    assert stoker_client.submit(rows, resume=False, progress=False).id != first.id
    assert stoker_client.submit(rows, model="scripted", max_output_tokens=9, progress=False).id != first.id
    first.cancel()
    with pytest.raises(BatchFailed, match="was cancelled"):
        again.results()
    capsys.readouterr()
    other = stoker_client.submit(rows, progress=False)
    assert other.id != first.id
    assert stoker_client.submit(rows, progress=False).id == other.id
    assert capsys.readouterr() == ("", ""), "progress=False is silent"
    assert [one.error for one in other.results()] == [None, None]


def test_a_paused_batch_is_told_of_with_its_reason(named: Served) -> None:
    batch = stoker_client.submit([f"{uuid4()} [[latency 5]]"], progress=False)
    pause = "UPDATE batches SET paused_reason = 'all failed' WHERE id = :id"
    execute(named.database, pause, id=UUID(batch_hex(batch.id)))
    with pytest.raises(BatchFailed, match=r"is paused: all failed.*stoker resume"):
        batch.results()


SCRIPT: Final = """
import sys, stoker_client
mark = sys.argv[1]
found = stoker_client.run([f"{mark} {n} [[latency 0.4]]" for n in range(64)], cache="off")
print(sum(one.error is None for one in found))
"""


def test_a_killed_process_that_runs_again_asks_nothing_twice(named: Served) -> None:
    mark = uuid4().hex
    command = [sys.executable, "-c", SCRIPT, mark]

    def asked() -> dict[str, int]:
        return {prompt: times for prompt, times in named.endpoint.calls().prompts.items() if mark in prompt}

    with subprocess.Popen(command, stderr=subprocess.PIPE) as killed:
        wait_until(asked, 30, "the engine is asked")
        killed.kill()
    assert len(asked()) < 64
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout == "64\n" and "has these rows already" in again.stderr
    assert set(asked().values()) == {1} and len(asked()) == 64
    assert rows_of(named.database, "SELECT count(*) FROM jobs WHERE body::text LIKE :mark", mark=f"%{mark}%") == [(64,)]


def test_ctrl_c_leaves_the_batch_and_says_how_to_go_on(named: Served) -> None:
    mark = uuid4().hex
    command = [sys.executable, "-c", SCRIPT, mark]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as stopped:
        wait_until(lambda: any(mark in prompt for prompt in named.endpoint.calls().prompts), 30, "the engine is asked")
        stopped.send_signal(signal.SIGINT)
        assert stopped.stderr is not None
        said = stopped.stderr.read()
    assert stopped.returncode != 0 and "goes on at the gateway; the same call again follows it" in said
    assert named.api_key not in said


def test_an_event_loop_is_not_blocked_and_cancelling_only_stops_waiting(named: Served) -> None:
    rows = [f"{uuid4()} [[latency 0.6]]"]

    async def scenario() -> list[Answer]:
        waiting = asyncio.create_task(stoker_client.run_async(rows, progress=False))
        await asyncio.sleep(0)
        both = await asyncio.gather(
            stoker_client.run_async(["a"], progress=False), stoker_client.run_async(["b"], progress=False)
        )
        assert [one.text for [one] in both] == ["echo: a", "echo: b"]
        with pytest.raises(BadInput, match="no slot"):
            await stoker_client.run_async(["a"], prompt="none")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        found: list[Answer] = await stoker_client.run_async(rows, progress=False)
        return found

    [answer] = asyncio.run(scenario())
    assert answer.error is None
    assert named.endpoint.calls().prompts[rows[0]] == 1


def test_the_script_of_the_examples_runs(named: Served, tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "table.py"
    labels = {"crashes when I log in": "bug", "Love the new colours": "praise", "Can I pay by invoice": "question"}
    for said, label in labels.items():
        named.endpoint.script(f'[[answer {{"label":"{label}"}}]]', match=said)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    header, *shown = done.stdout.splitlines()
    assert header.split() == ["text", "answer", "error"]
    assert [line.split()[-2:] for line in shown] == [[label, "<NA>"] for label in labels.values()]


def test_the_notebook_of_the_examples_runs_from_top_to_bottom(named: Served) -> None:
    notebook = nbformat.read(REPOSITORY / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    named.endpoint.script('[[answer {"label":"bug"}]]', match="Is this a bug")
    named.endpoint.script('[[answer {"area":"app","is_urgent":true,"stars":2}]]', match="is it urgent")
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert "bug    12" in shown[2][-1].data["text/plain"]
    assert "True      2" in shown[3][-1].data["text/plain"] and "Empty DataFrame" in shown[4][-1].data["text/plain"]
    said = "".join(output.get("text", "") for outputs in shown for output in outputs)
    assert "completed: 100%" in said and "Warning" not in said


def test_a_chain_of_langchain_is_one_batch(named: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = pytest.importorskip("langchain_core.prompts", reason="no langchain-core: pip install langchain-core")
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    chain = prompts.PromptTemplate.from_template("{of}: {text}") | import_module("langchain_batch").Stoker(
        progress=False
    )
    before = rows_of(named.database, "SELECT count(*) FROM batches")[0][0]
    rows = [{"of": "a", "text": "x"}, {"of": "b", "text": "[[status 400]]"}]
    right, wrong = chain.batch(rows, return_exceptions=True)
    assert right == "echo: a: x" and "input 2: " in str(wrong)
    assert rows_of(named.database, "SELECT count(*) FROM batches") == [(before + 1,)]
    with pytest.raises(RuntimeError, match="input 2: "):
        chain.batch(rows)
    assert chain.invoke(rows[0]) == "echo: a: x"
