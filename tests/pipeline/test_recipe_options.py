"""What a line may say of a recipe, and how submit refuses what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.lines import SubmitOptions
from pipeline.recipes import named_recipe, read_options
from pipeline.submit import dry_run
from runtime.errors import BadInput, InvalidFile, Problem
from runtime.settings import Settings
from tests.support.batches import CHAT, chat
from tests.support.cooking import (
    OUTPUT,
    SCHEMA,
    line,
)

CIRCLE = {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}}
# Thirty lines that say a thousand million times the same.
DOUBLING: dict[str, Any] = {"0": {}} | {str(n): {"allOf": [{"$ref": f"#/$defs/{n - 1}"}] * 2} for n in range(1, 31)}


def refused(file: Path, content: str) -> Problem:
    """The one problem of a batch file."""
    file.write_text(content)
    options = SubmitOptions(max_output_tokens=OUTPUT)
    with pytest.raises(InvalidFile) as caught:
        dry_run(file, options=options, settings=Settings.model_construct(), served_models=None)
    [problem] = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("recipe", "options", "fault"),
    [
        ("sumarize", {}, "stoker.recipe: no recipe sumarize; there are ask, classify, extract, index, summarize"),
        ("summarize", {"x": 1}, "stoker.options: Object contains unknown field `x` (recipe summarize; its options: no"),
        ("classify", {}, "stoker.options: Object missing required field `labels` (recipe classify; its options: label"),
        ("classify", {"labels": ["a"]}, "stoker.options: Expected `array` of length >= 2 - at `$.labels` (recipe cla"),
        ("classify", {"labels": ["a", "a"]}, "stoker.options: labels: each may be there once (recipe classify"),
        ("ask", {"top_k": 0}, "stoker.options: Expected `int` >= 1 - at `$.top_k` (recipe ask; its options: top_k)"),
        ("extract", {"schema": {"type": "string"}}, 'stoker.options: schema: must be of "type": "object", with the'),
        ("extract", {"schema": {**SCHEMA, "required": 3}}, "stoker.options: schema: 3 is not of type 'array'; write a"),
        (
            "extract",
            {"schema": {**SCHEMA, "$ref": "http://127.0.0.1/x"}},
            "stoker.options: schema: refers to http://127.0.0.1/x, which is not fetched; put it under $defs",
        ),
        (
            "extract",
            {"schema": {**SCHEMA, "allOf": [{"$ref": "#/$defs/none"}]}},
            "stoker.options: schema: refers to #/$defs/none, which",
        ),
        (
            "extract",
            {"schema": {**SCHEMA, "allOf": [{"$ref": "#/$defs/a"}], "$defs": CIRCLE}},
            "stoker.options: schema: #/$defs/a refers to it",
        ),
        (
            "extract",
            {"schema": {**SCHEMA, "allOf": [{"$ref": "#/$defs/30"}], "$defs": DOUBLING}},
            "stoker.options: schema: has over",
        ),
        (
            "extract",
            {"schema": {**SCHEMA, "properties": {"a": {"pattern": "a(?=b)"}}}},
            "stoker.options: schema: the pattern 'a(?=b)' is refused",
        ),
        ("extract", {"schema": {**SCHEMA, "title": "x" * 40_000}}, "stoker.options: schema: has more than 32,768 by"),
    ],
)
def test_a_wrong_recipe_is_refused_at_submit_with_its_remedy(
    tmp_path: Path, recipe: str, options: dict[str, Any], fault: str
) -> None:
    plain = {"custom_id": "1", "method": "POST", "url": CHAT, "body": chat("plain")}
    wrong = plain | line(recipe, 1, options=options) | {"custom_id": "2"}
    problem = refused(tmp_path / "in.jsonl", f"{json.dumps(plain)}\n{json.dumps(wrong)}\n")
    assert str(problem).startswith(f"line 2: {fault}")
    assert problem.code == "invalid_request"


@pytest.mark.parametrize(
    ("content", "seed", "fault"),
    [("", "1", "body: documents need a user message with text"), ("x", "1e999", "body: Number out of range")],
)
def test_a_recipe_whose_request_asks_nothing_is_refused_at_submit(
    tmp_path: Path, content: str, seed: str, fault: str
) -> None:
    body = json.dumps(chat(content))[:-1] + f', "seed": {seed}}}'
    given = f'{{"custom_id": "1", "method": "POST", "url": "{CHAT}", "body": {body}, '
    problem = refused(tmp_path / "in.jsonl", given + '"stoker": {"recipe": "summarize", "document": 1}}')
    assert str(problem).startswith(f"line 1: {fault}")


def test_options_are_read_once_for_many_lines() -> None:
    one, other = (read_options(named_recipe("classify"), {"labels": ["a", "b"]}) for _ in range(2))
    assert one is other
    with pytest.raises(BadInput, match="its options: labels"):
        read_options(named_recipe("classify"), {"labels": "a,b"})
