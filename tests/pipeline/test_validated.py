"""Answers of a batch that validates: held to their request's schema, repaired once, or failed with what was wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from models.lines import SubmitOptions
from pipeline.cached import ExactCache
from pipeline.forms import answer_schema
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
    assert answer_of(shown) == YES
    took = {"prompt_tokens": 20, "completion_tokens": 4}
    assert shown["stoker"] == {"outcome": "succeeded", "source": "engine", "usage": took, "repaired": True}
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
        (
            ('{"label": "ye',),
            "length",
            1,
            "the answer was cut by its limit of tokens; raise that (its JSON takes some 10 beside what it says). The",
        ),
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


NESTED: dict[str, Any] = {}
for _ in range(12):
    NESTED = {"allOf": [NESTED], "unevaluatedProperties": False}


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (
            {"properties": {"a": {"$schema": "https://json-schema.org/draft/2020-12/schema"}}},
            "schema: $schema may take",
        ),
        (NESTED, "schema: unevaluatedProperties may take ages to check"),
        ({"$defs": {"a": {"$id": "x"}}}, "schema: $id may take ages to check"),
        ({"$ref": "#/%24defs/a", "$defs": {"a": {}}}, "schema: refers to #/%24defs/a, which is not fetched"),
        ({"type": "objct"}, "schema: 'objct' is not valid under any of the given schemas; write a JSON schema"),
        (
            {"pattern": r"(a)\1"},
            "schema: the pattern '(a)\\\\1' is refused (invalid escape sequence: \\1); write it as RE2",
        ),
    ],
    ids=["nested $schema", "unevaluated", "$id", "escaped", "type", "pattern"],
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


@pytest.mark.parametrize("pattern", [r"^\p{L}+$", "^(?:(?i)yes|no)$", r"a\z", "^(a+)+$"])
def test_patterns_are_those_of_re2(pattern: str) -> None:
    schema = answer_schema(json.dumps({"properties": {"a": {"pattern": pattern}}}).encode())
    assert schema.fault(json.dumps({"a": "a" * 50_000 + "!"})) is not None


@pytest.mark.parametrize("name", ["unevaluatedProperties", "$id", "patternProperties", "$schema", "uniqueItems"])
def test_a_property_may_be_called_as_a_keyword_is(name: str) -> None:
    schema = answer_schema(json.dumps({"properties": {name: {"type": "string"}}}).encode())
    assert schema.fault(json.dumps({name: "x"})) is None and schema.fault(json.dumps({name: 1})) is not None


def test_checking_an_answer_ends_after_so_many_steps() -> None:
    wide = {"items": {"anyOf": [{"const": n} for n in range(1_000)]}}
    schema = answer_schema(json.dumps(wide).encode())
    assert schema.fault(json.dumps([999] * 10)) is None
    assert "takes more than 30,000 steps to check" in (schema.fault(json.dumps([999] * 500)) or "")
    unique = answer_schema(b'{"uniqueItems": true}')
    assert unique.fault(json.dumps([{"a": n} for n in range(5_000)])) is None
    assert unique.fault('[{"a": 1, "b": 2}, {"b": 2, "a": 1}]') is not None


def test_a_file_may_have_so_many_schemas(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    many = [{"custom_id": str(n), "method": "POST", "url": CHAT, **held("q", {"title": str(n)})} for n in range(65)]
    file.write_text("".join(json.dumps(line) + "\n" for line in many))
    options = SubmitOptions(max_output_tokens=64, validate_answers=True)
    with pytest.raises(InvalidFile) as caught:
        dry_run(file, options=options, settings=Settings.model_construct(), served_models=None)
    [problem] = caught.value.problems
    assert str(problem).startswith("line 65: body.response_format: schema: the lines before have 64 others")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (held("q", n=2), "n: several answers to one request are not validated; ask for one"),
        (held("q") | {"stoker": {"turns": ["a", "b"]}}, "answers of a conversation or a recipe are not validated"),
    ],
    ids=["n", "turns"],
)
def test_what_cannot_be_validated_is_said_at_submit(tmp_path: Path, line: dict[str, Any], fault: str) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"custom_id": "1", "method": "POST", "url": CHAT, **line}) + "\n")
    options = SubmitOptions(max_output_tokens=64, validate_answers=True)
    with pytest.raises(InvalidFile) as caught:
        dry_run(tmp_path / "in.jsonl", options=options, settings=Settings.model_construct(), served_models=None)
    assert fault in str(caught.value.problems[0])


def test_a_repair_waits_for_tokens_that_others_have_reserved(database: Database, tmp_path: Path) -> None:
    """Two jobs whose first requests reserve nearly all: one gives up its reservation with its result."""
    slow = threading.Event()

    def reply(number: int, body: dict[str, Any]) -> dict[str, Any]:
        if body["messages"][0]["content"] == "good":
            slow.wait(10)
            return answer(YES)
        if len(body["messages"]) == 1:
            threading.Timer(1.5, slow.set).start()
            return answer(MAYBE)
        return answer(YES)

    with ShownEndpoint(reply) as endpoint:
        lines = [held("bad"), held("good")]
        batch_id = store_lines(database, tmp_path, lines, validate_answers=True, budget_tokens=2 * 933 + 40)
        Child(database, endpoint.url).feed()
    assert [line["stoker"]["outcome"] for line in lines_of(database, batch_id)] == ["succeeded", "succeeded"]
    assert rows(database, "SELECT spent, reserved FROM budgets") == [(36, 0)]
