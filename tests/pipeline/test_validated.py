"""Answers of a batch that validates: held to their request's schema, repaired once, or failed with what was wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from models.lines import SubmitOptions
from pipeline.cached import ExactCache
from pipeline.submit import dry_run
from runtime.errors import InvalidFile
from runtime.settings import CacheSettings, Settings
from store.database import Database
from store.engines import register_engine
from store.recent import RecentAnswers
from tests.support.batches import CHAT, chat, rows
from tests.support.conversing import Child, ShownEndpoint, answer, store_lines
from tests.support.cooking import answer_of, lines_of

LABELS = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["label"],
    "additionalProperties": False,
}
DATE = {"type": "object", "properties": {"answer": {"type": "string", "pattern": r"^(?:\d{4}-\d\d)$"}}}
YES, MAYBE = '{"label": "yes"}', '{"label": "maybe"}'


def held(prompt: str, schema: Any = LABELS, **fields: Any) -> dict[str, Any]:
    """A line whose request states a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    return {"body": chat(prompt, temperature=0, response_format=form, **fields)}


def saying(*texts: str, finish: str = "stop") -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """An endpoint's answers in their order, the last one again and again."""
    return lambda number, _: answer(texts[min(number, len(texts)) - 1], finish=finish)


def ended(
    database: Database, folder: Path, line: dict[str, Any], endpoint: ShownEndpoint, **options: Any
) -> dict[str, Any]:
    """The result line of a validating batch of this line alone."""
    batch_id = store_lines(database, folder, [line], validate_answers=True, **options)
    Child(database, endpoint.url).feed()
    [found] = lines_of(database, batch_id)
    return found


def usage_of(database: Database) -> tuple[int, int]:
    [(prompt, completion)] = rows(database, "SELECT prompt_tokens, completion_tokens FROM results")
    return prompt, completion


@pytest.mark.parametrize(("said", "line"), [(YES, held("q")), ('{"answer": "2026-11"}', held("q", DATE))], ids="ab")
def test_a_valid_answer_stands_as_it_is(database: Database, tmp_path: Path, said: str, line: dict[str, Any]) -> None:
    with ShownEndpoint(saying(said)) as endpoint:
        shown = ended(database, tmp_path, line, endpoint)
    assert answer_of(shown) == said and "repaired" not in shown["stoker"]
    assert len(endpoint.bodies) == 1


def test_a_wrong_answer_is_repaired_once_and_counts_the_tokens_of_both(database: Database, tmp_path: Path) -> None:
    with ShownEndpoint(saying(MAYBE, YES)) as endpoint:
        shown = ended(database, tmp_path, held("is it?"), endpoint)
    assert answer_of(shown) == YES and shown["stoker"] == {"outcome": "succeeded", "source": "engine", "repaired": True}
    first, repair = endpoint.bodies
    assert repair["messages"][:2] == [*first["messages"], {"role": "assistant", "content": MAYBE}]
    assert "'maybe' is not one of ['yes', 'no']" in repair["messages"][2]["content"]
    assert repair["response_format"] == first["response_format"]
    assert endpoint.request_ids[1] == f"{endpoint.request_ids[0]}_repair"
    assert usage_of(database) == (20, 4)


@pytest.mark.parametrize(
    ("said", "finish", "asked", "message"),
    [
        ((MAYBE, "neither"), "stop", 2, "also after one repair. The answer: neither"),
        (('{"label": "ye',), "length", 1, "it was cut by its limit of tokens; raise that. The answer: {"),
        (("",), "stop", 2, "also after one repair"),
    ],
    ids=["twice wrong", "cut", "empty"],
)
def test_what_stays_wrong_fails_with_the_fault_and_the_answer(
    database: Database, tmp_path: Path, said: tuple[str, ...], finish: str, asked: int, message: str
) -> None:
    with ShownEndpoint(saying(*said, finish=finish)) as endpoint:
        shown = ended(database, tmp_path, held("q"), endpoint)
    assert shown["response"] is None and shown["error"]["code"] == "invalid_answer"
    assert message in shown["error"]["message"]
    assert len(endpoint.bodies) == asked and usage_of(database) == (10 * asked, 2 * asked)


def test_without_a_budget_for_it_there_is_no_repair(database: Database, tmp_path: Path) -> None:
    with ShownEndpoint(saying(MAYBE, YES)) as endpoint:
        shown = ended(database, tmp_path, held("q", max_tokens=64), endpoint, budget_tokens=940)
    assert "not repaired" in shown["error"]["message"] and len(endpoint.bodies) == 1
    assert rows(database, "SELECT spent, reserved FROM budgets") == [(12, 0)]


def test_requests_that_ask_for_no_json_are_not_looked_into(database: Database, tmp_path: Path) -> None:
    with ShownEndpoint(saying("free text")) as endpoint:
        shown = ended(database, tmp_path, {"body": chat("q")}, endpoint)
    assert answer_of(shown) == "free text" and len(endpoint.bodies) == 1


def test_an_answer_that_nobody_checked_serves_no_batch_that_validates(
    database: Database, redis_url: str, tmp_path: Path
) -> None:
    with database.transaction() as session:
        engine_id = register_engine(session, {"kind": "vllm", "checkpoint_digest": "1"})
    recent = RecentAnswers(redis_url)
    with ShownEndpoint(saying(MAYBE, MAYBE, YES)) as endpoint:
        child = Child(database, endpoint.url)
        child.engine_id, child.cache = engine_id, ExactCache(recent, CacheSettings(), engine_id=lambda: engine_id)

        def sources(**options: Any) -> UUID:
            batch_id = store_lines(database, tmp_path, [held("q")], **options)
            child.feed()
            return batch_id

        plain, checked, again = sources(), sources(validate_answers=True), sources(validate_answers=True)
    recent.close()
    assert [lines_of(database, batch)[0]["stoker"]["source"] for batch in (plain, checked, again)] == [
        "engine",
        "engine",
        "exact",
    ]
    assert answer_of(lines_of(database, again)[0]) == YES and len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "objct"}, "schema: 'objct' is not valid under any of the given schemas; write a JSON schema"),
        (
            {"pattern": r"(a)\1"},
            "schema: the pattern '(a)\\\\1' is refused (invalid escape sequence: \\1); write it as RE2",
        ),
    ],
    ids=["type", "pattern"],
)
def test_a_wrong_schema_is_refused_at_submit_by_line(tmp_path: Path, schema: dict[str, Any], fault: str) -> None:
    file = tmp_path / "in.jsonl"
    lines = [
        {"custom_id": str(n), "method": "POST", "url": CHAT, **held("q", s)} for n, s in enumerate([LABELS, schema])
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = SubmitOptions(max_output_tokens=64, validate_answers=True)
    with pytest.raises(InvalidFile) as caught:
        dry_run(file, options=options, settings=Settings.model_construct(), served_models=None)
    [problem] = caught.value.problems
    assert str(problem).startswith(f"line 2: body.response_format: {fault}")
