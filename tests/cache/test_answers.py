"""What of a response is compared, and what is never served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cache.answers import Kind, answer_text, comparable, comparison


def response(content: str | None, *, finish: str = "stop", choices: int = 1, **message: Any) -> str:
    choice = {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return json.dumps({"choices": [choice] * choices})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("card", " card\n"),
        ('{"a": 1, "b": [2.0]}', '{"b":[2],"a":1.0}'),
        ("7", "7.0"),
        ("[1, 2]", "[1,2]"),
        ("100", "1e2"),
        ("-0.0", "0"),
        ("12345678901234567890.50", "12345678901234567890.5"),
    ],
)
def test_answers_that_mean_the_same_are_equal(one: str, other: str) -> None:
    assert comparison(response(one)) == comparison(response(other)) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "Yes"),
        ("yes", "yes."),
        ("7", "8"),
        ('{"a":1}', '{"a":"1"}'),
        ('{"a":1.5}', '{"a":"1.5"}'),
        ("[1,2]", "[2,1]"),
        ("1", '"1"'),
        ("123456789012345678901234567890", "123456789012345678901234567891"),
        (f"[0.{'1' * 31}1]", f"[0.{'1' * 31}2]"),
    ],
)
def test_answers_that_may_differ_are_not(one: str, other: str) -> None:
    assert comparison(response(one)) != comparison(response(other))


@pytest.mark.parametrize(
    "answer",
    [
        response("two\nlines"),
        response("a text that goes on for longer than any label of a classification would have to be"),
        response(""),
        response(None),
        response("card", finish="length"),
        response("card", finish="content_filter"),
        response("card", choices=2),
        response("card", refusal="I will not"),
        response("card", tool_calls=[{"id": "1"}]),
        response("card", function_call={"name": "f"}),
        response(f"[{'9' * 101}]"),
        response("with\0NUL"),
        "no json",
        "{}",
        '{"choices":[]}',
    ],
)
def test_free_text_and_what_is_no_whole_answer_is_never_served(answer: str) -> None:
    assert comparison(answer) is None


def test_a_completion_is_compared_by_its_text() -> None:
    assert answer_text('{"choices":[{"text":" card","finish_reason":"stop"}]}') == " card"


@pytest.mark.parametrize("text", ["1e999999999", "-1e-101", "[1e999999999]", '{"a":1e9999999999999999999}'])
def test_a_number_that_cannot_be_compared_makes_a_label_of_its_letters(text: str) -> None:
    assert comparable(text) == (Kind.LABEL, text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("card", Kind.LABEL), ("-3.5", Kind.NUMBER), ("true", Kind.LABEL), ('{"a":1}', Kind.JSON), ("a\nb", Kind.FREE)],
)
def test_kinds_of_answers(text: str, kind: Kind) -> None:
    assert comparable(text)[0] is kind
