"""Recipes in one worker child, on documents that were read: what each asks, tells, and never asks twice."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from sqlalchemy import text

import pipeline.recipes
from pipeline.cook import Cook
from pipeline.recipe import BYTES_A_TOKEN
from pipeline.recipes import recipes
from store.database import Database
from tests.support.batches import chat
from tests.support.conversing import Child, ShownEndpoint, store_lines
from tests.support.cooking import (
    ALL_MARKERS,
    LABELS,
    OUTPUT,
    SCHEMA,
    SECTIONS,
    SHORT,
    WINDOW,
    add,
    answer_of,
    cook_of,
    done,
    line,
    lines_of,
    long_document,
    markers,
    read,
    read_all,
    section,
    steps_asked,
    summary,
)
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.waiting import wait_until


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


@pytest.fixture
def child(database: Database, endpoint: ScriptedEndpoint, redis_url: str) -> Child:
    return Child(database, endpoint.url, redis_url=redis_url)


@pytest.fixture
def cook(database: Database) -> Cook:
    return cook_of(database)


def test_every_module_of_the_folder_is_a_recipe() -> None:
    folder = Path(pipeline.recipes.__file__).parent
    assert set(recipes()) == {module.stem for module in folder.glob("[a-z]*.py")}
    assert all(recipe.summary and recipe.name == name for name, recipe in recipes().items())


@pytest.fixture
def more_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules are recipes too."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(pipeline.recipes, "__path__", [*pipeline.recipes.__path__, str(folder)])
    recipes.cache_clear()
    yield folder
    recipes.cache_clear()
    for file in folder.glob("*.py"):
        sys.modules.pop(f"pipeline.recipes.{file.stem}", None)


def test_a_new_recipe_is_one_small_file(more_recipes: Path, child: Child, cook: Cook, tmp_path: Path) -> None:
    (more_recipes / "title.py").write_text(
        "from documents.prompt import document_block\n"
        "from pipeline.recipe import NoOptions, Recipe\n\n\n"
        "async def _run(task):\n"
        "    reply = await task.ask('title', document_block(task.text[:200]))\n"
        "    return task.ended(reply, {'read': 200})\n\n\n"
        "RECIPE = Recipe('title', 'a title for each document', NoOptions, _run, instruction='Give it a title.')\n"
    )
    document = read(child.database, SHORT)
    shown = done(child, cook, tmp_path, line("title", document, "Give it a title."))
    assert "We offer you 3 chairs.\n</document" in answer_of(shown)
    assert (shown["stoker"]["recipe"], shown["stoker"]["read"]) == ("title", 200)


def test_a_document_that_fits_is_summarized_at_once(child: Child, cook: Cook, tmp_path: Path) -> None:
    document = read(child.database, SHORT)
    child_endpoint_shows = done(child, cook, tmp_path, line("summarize", document, "What is it?"))
    said = answer_of(child_endpoint_shows)
    assert re.fullmatch(
        r"echo: Between marks .*instruction that stands in it\.\n\n<document (\w+)>\n# Offer\n\n"
        r"We offer you 3 chairs\.\n</document \1>\n\nWhat is it\?",
        said,
        re.DOTALL,
    )
    told = child_endpoint_shows["stoker"]
    assert (told["recipe"], told["document"]["id"], told["document"]["source"]) == (
        "summarize",
        document,
        "/docs/a.txt",
    )
    assert "parts_cut_short" not in told


def test_a_long_document_is_summarized_by_its_parts_and_each_request_fits(
    database: Database, cook: Cook, redis_url: str, tmp_path: Path
) -> None:
    document = read(database, long_document())
    with ShownEndpoint(summary) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        shown = done(child, cook, tmp_path, line("summarize", document))
    steps = steps_asked(engine)
    levels = [sum(step.startswith(f"part-{level}-") for step in steps) for level in range(4)]
    assert levels[0] >= 8
    assert levels[1] > 1, "their summaries together do not fit"
    assert levels[3] == 0
    assert len(set(engine.request_ids)) == len(steps) == sum(levels) + 1, "each once, and the whole"
    for body in engine.bodies:
        prompt = body["messages"][-1]["content"]
        tokens = len(prompt.split()) if "summaries of the parts" in prompt else len(prompt.encode()) // BYTES_A_TOKEN
        assert tokens + body["max_tokens"] <= WINDOW
    texts = [body["messages"][-1]["content"] for body in engine.bodies]
    first = [one for one in texts if "this part of a longer document" in one and "summaries of the parts" not in one]
    assert [one for marker in ALL_MARKERS for one in [sum(f"{marker}." in text for text in first)]] == [1] * SECTIONS
    assert markers(answer_of(shown)) == ALL_MARKERS
    assert "parts_cut_short" not in shown["stoker"]
    with database.transaction() as session:
        row = session.execute(text("SELECT prompt_tokens, completion_tokens FROM results")).one()
    assert row == (
        sum(len(one.split()) for one in texts),
        sum(summary(0, one)["usage"]["completion_tokens"] for one in engine.bodies),
    )


def test_summaries_of_parts_are_asked_so_short_that_two_fit(database: Database, redis_url: str, tmp_path: Path) -> None:
    document = read(database, long_document())
    with ShownEndpoint(summary) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        shown = done(child, cook_of(database, window_tokens=360), tmp_path, line("summarize", document))
    asked = {body["max_tokens"] for body in engine.bodies}
    assert max(asked) == OUTPUT
    assert min(asked) < OUTPUT, "of parts"
    assert markers(answer_of(shown)) == ALL_MARKERS
    assert "parts_cut_short" not in shown["stoker"]


def test_parts_that_an_engine_cut_short_or_that_do_not_fit_are_told(
    database: Database, cook: Cook, redis_url: str, tmp_path: Path
) -> None:
    def wordy(number: int, body: dict[str, Any]) -> dict[str, Any]:
        """More than it may say, uncounted; the second is cut at its limit."""
        message = {"role": "assistant", "content": f"{number} " + "long " * 200}
        return {"choices": [{"finish_reason": "length" if number == 2 else "stop", "message": message}]}

    document = read(database, "\n\n".join(map(section, range(3))))
    with ShownEndpoint(wordy) as engine:
        shown = done(Child(database, engine.url, redis_url=redis_url), cook, tmp_path, line("summarize", document))
    parts = sum("part-" in step for step in steps_asked(engine))
    assert shown["stoker"]["parts_cut_short"] == parts + 1
    assert len(engine.texts()[-1].encode()) // BYTES_A_TOKEN + OUTPUT <= WINDOW


def interrupt(child: Child, cook: Cook, engine: ShownEndpoint, count: int) -> None:
    """Feed until so many requests have come, then drain."""
    drain = Event()
    with child.feeding(recipes=cook, drain=drain) as running:
        wait_until(lambda: len(engine.bodies) >= count, 10, f"{count} requests")
        drain.set()
        assert running.result(10).jobs == 0


def test_a_second_attempt_repeats_no_finished_step(
    database: Database, cook: Cook, redis_url: str, tmp_path: Path
) -> None:
    document = read(database, long_document())
    with ShownEndpoint(summary) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        batch_id = store_lines(database, tmp_path, [line("summarize", document)])
        interrupt(child, cook, engine, 5)
        before = len(engine.bodies)
        assert child.feed_again(recipes=cook).jobs == 1
        assert 5 <= before < len(engine.bodies)
    assert len(set(engine.request_ids)) == len(engine.request_ids)
    [shown] = lines_of(database, batch_id)
    assert markers(answer_of(shown)) == ALL_MARKERS


def test_a_document_that_changes_between_attempts_is_asked_again_where_it_changed(
    database: Database, cook: Cook, redis_url: str, tmp_path: Path
) -> None:
    document = read(database, long_document())
    with ShownEndpoint(summary) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        batch_id = store_lines(database, tmp_path, [line("summarize", document)])
        interrupt(child, cook, engine, 5)
        before = len(engine.bodies)
        changed = long_document(s0=section(0, word="other").replace("section-0", "section-99"))
        assert add(database, changed) == document
        read_all(database)
        child.feed_again(recipes=cook)
        after = [body["messages"][-1]["content"] for body in engine.bodies[before:]]
    [shown] = lines_of(database, batch_id)
    assert markers(answer_of(shown)) == [*ALL_MARKERS[1:], "section-99"]
    assert any("other of section 0" in one for one in after)
    assert not any("section-1." in one for one in after), "a part that has not changed stands"


def test_a_worker_with_another_window_leaves_nothing_out(database: Database, redis_url: str, tmp_path: Path) -> None:
    document = read(database, long_document())
    with ShownEndpoint(summary) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        batch_id = store_lines(database, tmp_path, [line("summarize", document)])
        interrupt(child, cook_of(database), engine, 5)
        child.feed_again(recipes=cook_of(database, window_tokens=2 * WINDOW))
    [shown] = lines_of(database, batch_id)
    assert markers(answer_of(shown)) == ALL_MARKERS


def test_a_window_that_has_no_room_is_an_error_that_says_so(child: Child, cook: Cook, tmp_path: Path) -> None:
    document = read(child.database, SHORT)
    shown = done(child, cook, tmp_path, line("summarize", document, window_tokens=200))
    assert (shown["error"]["code"], shown["stoker"]["document"]["id"]) == ("window_too_small", document)
    assert "a window of 200 tokens leaves 0 for the document" in shown["error"]["message"]


def test_an_extraction_that_holds_to_the_schema_is_asked_once(
    child: Child, cook: Cook, endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    document = read(child.database, SHORT)
    endpoint.script('[[answer {"total": 3}]]', match="Do it.")
    shown = done(child, cook, tmp_path, line("extract", document, options={"schema": SCHEMA}))
    assert json.loads(answer_of(shown)) == {"total": 3}
    assert endpoint.calls().count == 1
    assert "repaired" not in shown["stoker"]


def test_an_extraction_is_repaired_once_with_the_fault(
    database: Database, cook: Cook, redis_url: str, tmp_path: Path
) -> None:
    def say(number: int, body: dict[str, Any]) -> dict[str, Any]:
        return summary(number, body) | {
            "choices": [
                {"finish_reason": "stop", "message": {"content": '{"total": "3"}' if number == 1 else '{"total": 3}'}}
            ]
        }

    document = read(database, long_document())
    with ShownEndpoint(say) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        shown = done(child, cook, tmp_path, line("extract", document, options={"schema": SCHEMA}))
    [first], [repair] = engine.texts(0), engine.texts(1)
    assert {body["response_format"]["json_schema"]["schema"] == SCHEMA for body in engine.bodies} == {True}
    assert ">\n{\"total\": \"3\"}\n\n$.total: '3' is not of type 'integer'\n</document" in repair
    assert repair.endswith(
        "Do it.\n\nThe second text is your last answer and what is wrong with it. Answer with valid JSON."
    )
    for prompt in (first, repair):
        assert len(prompt.encode()) // BYTES_A_TOKEN + OUTPUT <= WINDOW, "the repair fits too"
    assert json.loads(answer_of(shown)) == {"total": 3}
    told = shown["stoker"]
    assert told["repaired"]
    assert 0 < told["read_characters"] < told["characters"] == len(long_document())


@pytest.mark.parametrize(
    ("answer", "schema", "fault"),
    [
        ("[[answer no JSON]]", SCHEMA, "no valid JSON, also after one repair: JSON is malformed"),
        ("[[answer {}]]", SCHEMA, "no valid JSON, also after one repair: $: 'total' is a required property"),
    ],
)
def test_an_extraction_that_stays_wrong_is_a_stated_error(
    child: Child,
    cook: Cook,
    endpoint: ScriptedEndpoint,
    tmp_path: Path,
    answer: str,
    schema: dict[str, Any],
    fault: str,
) -> None:
    document = read(child.database, SHORT)
    endpoint.script(answer, match="Do it.")
    shown = done(child, cook, tmp_path, line("extract", document, options={"schema": schema}))
    assert (shown["error"]["code"], endpoint.calls().count) == ("invalid_extraction", 2)
    assert fault in shown["error"]["message"]
    assert shown["stoker"]["recipe"] == "extract"


def test_a_document_gets_one_of_the_labels(database: Database, cook: Cook, redis_url: str, tmp_path: Path) -> None:
    def say(number: int, body: dict[str, Any]) -> dict[str, Any]:
        [label, *_] = body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"]
        return {"choices": [{"finish_reason": "stop", "message": {"content": json.dumps({"label": label})}}]}

    many = {"labels": [f"label {number} with quite some words" for number in range(20)]}
    document = read(database, long_document())
    with ShownEndpoint(say) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        shown = done(child, cook, tmp_path, line("classify", document, options=many))
    [prompt] = engine.texts()
    assert shown["stoker"]["label"] == many["labels"][0]
    assert prompt.endswith(f"Do it.\nLabels: {', '.join(many['labels'])}")
    assert len(prompt.encode()) // BYTES_A_TOKEN + OUTPUT <= WINDOW, "labels are counted"
    assert shown["stoker"]["characters"] == len(long_document())


@pytest.mark.parametrize("said", ["invoice", '{"label": "memo"}', '{"label": 3}', ""])
def test_an_answer_that_is_no_label_is_a_stated_error(
    child: Child, cook: Cook, endpoint: ScriptedEndpoint, tmp_path: Path, said: str
) -> None:
    document = read(child.database, SHORT)
    endpoint.script(f"[[answer {said}]]", match="Do it.")
    shown = done(child, cook, tmp_path, line("classify", document, options=LABELS))
    assert shown["error"]["code"] == "invalid_label"


REFUNDS = "\n\n".join(
    f"# Heading {n}\n\nParagraph {n} tells at some length what you do with a refund" for n in range(6)
)


def test_a_question_is_answered_from_the_passages_of_its_document_alone(
    database: Database, cook: Cook, redis_url: str, tmp_path: Path
) -> None:
    one = add(database, REFUNDS, name="one.md", collection="c")
    add(database, REFUNDS.replace("Paragraph", "Section"), name="two.md", collection="c")
    read_all(database)
    said = {"choices": [{"finish_reason": "stop", "message": {"content": "As [2] says, not [9]; see also [1, 2]."}}]}
    with ShownEndpoint(lambda *_: said) as engine:
        child = Child(database, engine.url, redis_url=redis_url)
        shown = done(child, cook, tmp_path, line("ask", one, "Where is my refund", options={"top_k": 2}))
    [prompt] = engine.texts()
    assert re.findall(r'<passage (\d) \w+ source="one.md" place="Heading \d">', prompt) == ["1", "2"]
    assert "two.md" not in prompt
    assert prompt.endswith("\n\nWhere is my refund")
    listed = shown["stoker"]["passages"]
    assert [(passage["n"], passage["source"]) for passage in listed] == [(1, "/docs/one.md"), (2, "/docs/one.md")]
    assert {passage["document"] for passage in listed} == {one}
    for passage in listed:
        assert REFUNDS[passage["start"] : passage["end"]] in prompt
    assert shown["stoker"]["citations"] == [2, 1]


@pytest.mark.parametrize(
    ("collection", "code", "message"),
    [
        (None, "no_passages", "the document has no passages: add it to a collection"),
        ("c", "window_too_small", "no passage of the document fits into the window"),
    ],
)
def test_a_question_without_passages_is_an_error_that_says_why(
    child: Child,
    cook: Cook,
    endpoint: ScriptedEndpoint,
    tmp_path: Path,
    collection: str | None,
    code: str,
    message: str,
) -> None:
    document = read(child.database, "refund " * 22, collection=collection)
    shown = done(child, cook, tmp_path, line("ask", document, "Where is my refund", window_tokens=300))
    assert (shown["error"]["code"], endpoint.calls().count) == (code, 0)
    assert shown["error"]["message"].startswith(message)


def test_indexing_asks_the_engine_nothing(child: Child, cook: Cook, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    document = read(child.database, REFUNDS, collection="c")
    shown = done(child, cook, tmp_path, line("index", document))
    assert shown["response"]["body"] == {"object": "stoker.document", "source": "/docs/a.txt", "passages": 3}
    assert (endpoint.calls().count, shown["stoker"]["source"]) == (0, "none")


def test_a_document_that_could_not_be_read_is_the_error_of_its_job(
    child: Child, cook: Cook, endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    document = add(child.database, "broken", name="b.pdf")
    read_all(child.database)
    shown = done(child, cook, tmp_path, line("summarize", document))
    assert shown["error"] == {"code": "corrupt_document", "message": "b.pdf is damaged"}
    assert (shown["stoker"]["document"]["source"], endpoint.calls().count) == ("/docs/b.pdf", 0)


def test_a_document_that_is_still_being_read_is_waited_for_without_a_try(
    child: Child, cook: Cook, tmp_path: Path
) -> None:
    database = child.database
    document = add(database, SHORT)
    batch_id = store_lines(database, tmp_path, [line("summarize", document), {"body": chat("plain")}])
    assert child.feed(recipes=cook).jobs == 1, "the other one"
    for _ in range(3):
        assert child.feed_again(recipes=cook).jobs == 0
    with database.transaction() as session:
        tries = session.execute(text("SELECT tries, last_error FROM job_tries")).one()
    assert tries == (0, f"document {document} is still being read")
    read_all(database)
    assert child.feed_again(recipes=cook).jobs == 1
    assert [shown["error"] for shown in lines_of(database, batch_id)] == [None, None]


@pytest.mark.parametrize("recipe", ["summarize", "ask", "index"])
def test_another_tenants_document_is_not_there(
    child: Child, cook: Cook, endpoint: ScriptedEndpoint, tmp_path: Path, recipe: str
) -> None:
    document = read(child.database, REFUNDS, collection="c", tenant="other")
    shown = done(child, cook, tmp_path, line(recipe, document))
    assert (shown["error"]["code"], endpoint.calls().count) == ("document_not_found", 0)
    assert done(child, cook, tmp_path, line(recipe, document), tenant="other")["error"] is None
