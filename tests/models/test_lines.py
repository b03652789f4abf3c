"""What a line of a batch file must be, and what submit changes in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.lines import ENDPOINTS, LineRules, ParsedLine, SubmitOptions, parse_line, parse_sets
from runtime.errors import BadInput, Problem

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "x"}]
LIMIT = 100
GOOD = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":%s}\n'
BODY = b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":5}'

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=8,
)


def rules(*, line_bytes: int = 100_000, **options: Any) -> LineRules:
    return LineRules(options=SubmitOptions(**{"max_output_tokens": LIMIT, **options}), line_bytes=line_bytes)


def line(body: dict[str, Any] | None = None, /, **members: Any) -> bytes:
    whole = {
        "custom_id": "a",
        "method": "POST",
        "url": CHAT,
        "body": {"model": "m", "messages": MESSAGES} if body is None else body,
    } | members
    return json.dumps({name: value for name, value in whole.items() if value != "left out"}).encode() + b"\n"


def chat(**fields: Any) -> bytes:
    return line({"model": "m", "messages": MESSAGES} | fields)


def good(raw: bytes, held_to: LineRules | None = None) -> ParsedLine:
    found = parse_line(raw, 1, rules=held_to or rules(), endpoint=None)
    assert isinstance(found, ParsedLine), found
    return found


def bad(raw: bytes, held_to: LineRules | None = None, *, endpoint: str | None = None) -> Problem:
    found = parse_line(raw, 7, rules=held_to or rules(), endpoint=endpoint)
    assert isinstance(found, Problem), found
    assert found.line == 7
    return found


NESTED = b"[" * 700 + b"]" * 700
BAD_LINES = {
    "malformed JSON": (b'{"custom_id": "a",}\n', "invalid_json_line", None, "comma in object at byte 19"),
    "a truncated last line": (GOOD[:30], "invalid_json_line", None, "the file ends inside this line"),
    "a line that ends early": (b'{"custom_id": "a", "body": {\n', "invalid_json_line", None, ""),
    "invalid UTF-8 in the body": (
        GOOD % BODY.replace(b"x", b"\xff"),
        "invalid_json_line",
        None,
        "invalid UTF-8 at byte 121 of the line",
    ),
    "invalid UTF-8 in the id": (
        GOOD.replace(b'"a"', b'"\xff"') % BODY,
        "invalid_json_line",
        None,
        "invalid UTF-8 at byte 15",
    ),
    "a NUL byte": (GOOD % BODY.replace(b"x", b"\0"), "invalid_json_line", None, "NUL byte at byte 121"),
    "half a surrogate pair": (GOOD % BODY.replace(b"x", rb"\ud83d"), "invalid_json_line", None, r"\ud83d is half"),
    "the other half": (
        GOOD % BODY.replace(b"x", rb"\ud83d\ude00 \ude00"),
        "invalid_json_line",
        None,
        r"\ude00 is half",
    ),
    "deep nesting": (GOOD % BODY.replace(b'"x"', b"[" * 5000 + b"]" * 5000), "invalid_json_line", None, "too deeply"),
    "NaN": (GOOD % BODY.replace(b"5", b"NaN"), "invalid_json_line", None, "malformed"),
    "two objects": ((GOOD % BODY).strip() * 2, "invalid_json_line", None, "trailing characters"),
    "a list": (b"[1]\n", "invalid_json_line", None, "is a list; write a JSON object"),
    "a string": (b'"a"\n', "invalid_json_line", None, "is a string"),
    "no id": (line(custom_id="left out"), "missing_custom_id", "custom_id", "give every line its own"),
    "an empty id": (line(custom_id=""), "missing_custom_id", "custom_id", "give every line its own"),
    "a null id": (line(custom_id=None), "missing_custom_id", "custom_id", "give every line its own"),
    "a number as id": (line(custom_id=5), "invalid_request", "custom_id", "is a number; write a string"),
    "a long id": (line(custom_id="x" * 513), "invalid_request", "custom_id", "has 513 characters"),
    "an id with NUL": (line(custom_id="a\0"), "invalid_request", "custom_id", r"\u0000"),
    "no url": (line(url="left out"), "url_mismatch", "url", "is missing"),
    "a number as url": (line(url=1), "url_mismatch", "url", "no string"),
    "an unknown url": (line(url="/v1/images"), "url_mismatch", "url", "use /v1/chat/completions, "),
    "no method": (line(method="left out"), "invalid_request", "method", 'write "POST"'),
    "another method": (line(method="GET"), "invalid_request", "method", 'write "POST"'),
    "no body": (line(body="left out"), "invalid_request", "body", "is missing"),
    "a text as body": (line(body="text"), "invalid_request", "body", "must be a JSON object"),
    "null as body": (line(body=None), "invalid_request", "body", "must be a JSON object"),
    "no model": (line({"messages": MESSAGES}), "invalid_request", "body.model", "--model NAME"),
    "an empty model": (chat(model=""), "invalid_request", "body.model", "--model NAME"),
    "no messages": (line({"model": "m"}), "invalid_request", "body.messages", "non-empty list"),
    "empty messages": (chat(messages=[]), "invalid_request", "body.messages", "non-empty list"),
    "a text as messages": (chat(messages="x"), "invalid_request", "body.messages", "non-empty list"),
    "a message without role": (
        chat(messages=[*MESSAGES, {}]),
        "invalid_request",
        "body.messages[1].role",
        "is missing",
    ),
    "a number as role": (chat(messages=[{"role": 1}]), "invalid_request", "body.messages[0].role", "role"),
    "a text as message": (chat(messages=["x"]), "invalid_request", "body.messages[0]", "role"),
    "a stream": (chat(stream=True), "invalid_request", "body.stream", "cannot stream"),
    "no prompt": (line({"model": "m"}, url=COMPLETIONS), "invalid_request", "body.prompt", "is missing"),
    "no prompts": (
        line({"model": "m", "prompt": []}, url=COMPLETIONS),
        "invalid_request",
        "body.prompt",
        "non-empty list",
    ),
    "no input": (line({"model": "m"}, url="/v1/embeddings"), "invalid_request", "body.input", "is missing"),
    "NUL in the model": (chat(model="a\0"), "invalid_request", "body.model", r"without \u0000"),
    "settings nested too deeply": (
        chat().replace(b'"body"', b'"stoker":{"recipe":"extract","document":1,"options":{"a":%s}},"body"' % NESTED),
        "invalid_request",
        "stoker.options",
        "64 levels",
    ),
    "NUL in the name of a setting": (
        chat().replace(b'"body"', rb'"stoker":{"a\u0000":1},"body"'),
        "invalid_request",
        r"stoker.a\u0000",
        "is unknown",
    ),
    "a huge number": (GOOD % BODY.replace(b"5", b'5,"top_p":1e999'), "invalid_request", "body.top_p", "at most 1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_a_problem_with_code_field_and_remedy(name: str) -> None:
    raw, code, field, words = BAD_LINES[name]
    problem = bad(raw)
    assert (problem.code, problem.field) == (code, field)
    assert words in problem.message


@pytest.mark.parametrize(
    ("field", "refused", "accepted"),
    [
        ("temperature", [-0.1, 2.1, "0", [0]], [0, 2, 0.7, None]),
        ("top_p", [0, 1.01, True], [0.1, 1, None]),
        ("n", [0, 129, 1.5], [1, 128, None]),
        ("max_tokens", [0, -1, 1.5, "5", True], [1, 10**30, None]),
        ("max_completion_tokens", [0, -1, "5"], [1, 10**30, None]),
        ("presence_penalty", [-2.1, 2.1], [-2, 2, None]),
        ("frequency_penalty", [-2.1, 2.1], [-2, 2, None]),
        ("top_logprobs", [-1, 21], [0, 20, None]),
        ("stream", [True, 0, "no"], [False, None]),
    ],
)
def test_sampling_values_stay_in_their_ranges(field: str, refused: list[Any], accepted: list[Any]) -> None:
    for value in refused:
        problem = bad(chat(**{field: value}))
        assert (problem.code, problem.field) == ("invalid_request", f"body.{field}")
    for value in accepted:
        good(chat(**{field: value}))


def test_a_message_does_not_show_a_prompt() -> None:
    assert "secret" not in str(bad(chat(messages="secret")))
    assert "secret" not in str(bad(line({"model": "m", "prompt": {"secret": 1}}, url="/v1/completions")))


def test_a_line_of_the_full_length_passes_and_one_byte_more_does_not() -> None:
    raw = (GOOD % BODY).strip()
    for newline in (b"", b"\n", b"\r\n"):
        good(raw + newline, rules(line_bytes=len(raw)))
        problem = bad(raw + newline, rules(line_bytes=len(raw) - 1))
        assert problem.code == "invalid_request"
        assert "STOKER_LIMITS__LINE_BYTES" in problem.message


def test_a_url_other_than_the_batchs_is_refused() -> None:
    problem = bad(GOOD % BODY, endpoint="/v1/embeddings")
    assert problem.code == "url_mismatch"
    assert "a batch has one endpoint" in problem.message
    parse_line(GOOD % BODY, 1, rules=rules(), endpoint=CHAT)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_problem_and_never_an_exception(raw: bytes) -> None:
    assert isinstance(parse_line(raw, 1, rules=rules(), endpoint=None), Problem)


@given(json_values, json_values, json_values, json_values, st.sampled_from([*ENDPOINTS, "/v1/x"]), st.integers(0, 400))
def test_any_json_and_any_cut_of_it_raises_nothing(
    custom_id: Any, message: Any, number: Any, body: Any, url: str, cut: int
) -> None:
    for content in (
        body,
        {
            "model": "m",
            "messages": [message],
            "prompt": body,
            "input": body,
            "n": number,
            "max_tokens": number,
            "temperature": number,
            "stream": message,
        },
    ):
        raw = line(content, custom_id=custom_id, url=url)
        for part in (raw, raw[:cut]):
            for held_to in (rules(), rules(sets={"x": number}, model="q")):
                assert isinstance(parse_line(part, 1, rules=held_to, endpoint=None), ParsedLine | Problem)


@given(st.dictionaries(texts, json_values), st.sampled_from([None, 0, 3]), st.booleans())
def test_a_body_that_needs_no_change_keeps_its_bytes(
    unknown: dict[str, Any], indent: int | None, escaped: bool
) -> None:
    fields = {
        **{f"x-{name}": value for name, value in unknown.items()},
        "model": "m",
        "max_tokens": LIMIT,
        "messages": MESSAGES,
    }
    body = json.dumps(fields, indent=indent, ensure_ascii=escaped).replace("\n", "\t").encode()
    assert good(GOOD % body).body == body


def test_a_missing_limit_is_spliced_in_and_the_rest_keeps_its_bytes() -> None:
    body = b'{ "model":"m" , "seed": 1.50, "messages":[{"role":"user"}]}'
    found = good(GOOD % body)
    assert found.body == b'{"max_tokens":100,' + body[1:]
    assert json.loads(found.body)["max_tokens"] == LIMIT


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": None}, {"max_tokens": LIMIT}),
        ({"max_tokens": 101}, {"max_tokens": LIMIT}),
        ({"max_tokens": 99}, {"max_tokens": 99}),
        ({"max_completion_tokens": 101}, {"max_completion_tokens": LIMIT}),
        ({"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 5000}, {"max_completion_tokens": 7, "max_tokens": LIMIT}),
        ({"max_completion_tokens": None}, {"max_completion_tokens": None, "max_tokens": LIMIT}),
    ],
)
def test_the_limit_of_output_tokens_is_hard(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = good(chat(**fields))
    limits = {name: value for name, value in json.loads(found.body).items() if name.startswith("max")}
    assert limits == expected
    assert found.output_tokens == min(value for value in expected.values() if value)


def test_a_limit_behind_an_escaped_name_is_found() -> None:
    body = BODY.replace(b'"max_tokens":5', rb'"max\u005ftokens":5000')
    assert json.loads(good(GOOD % body).body)["max_tokens"] == LIMIT


def test_embeddings_have_no_limit() -> None:
    found = good(line({"model": "m", "input": ["x", "y"]}, url="/v1/embeddings"))
    assert json.loads(found.body) == {"model": "m", "input": ["x", "y"]}
    assert found.output_tokens == 0


@pytest.mark.parametrize(("prompt", "prompts"), [("x", 1), (["x", "y"], 2), ([1, 2, 3], 1), ([[1], [2, 3]], 2)])
def test_output_tokens_count_every_completion(prompt: Any, prompts: int) -> None:
    found = good(line({"model": "m", "prompt": prompt, "n": 3, "max_tokens": 10}, url="/v1/completions"))
    assert found.output_tokens == prompts * 30
    assert found.prompt_tokens == len(found.body) // 4


def test_sets_replace_fields_present_or_not_and_leave_the_others_as_they_are() -> None:
    body = b'{"model":"m","temperature":1,"seed": 1.50,"n":1,"messages":[{"role":"user","content":"\xc3\xa9\\u00e9"}]}'
    found = good(GOOD % body, rules(sets={"temperature": 0, "user": "me", "max_tokens": 500}, model="other"))
    assert json.loads(found.body) == {
        "model": "other",
        "temperature": 0,
        "seed": 1.5,
        "n": 1,
        "messages": [{"role": "user", "content": "éé"}],
        "user": "me",
        "max_tokens": LIMIT,
    }
    assert b"1.50" in found.body
    assert b'"\xc3\xa9\\u00e9"' in found.body
    assert found.model == "other"


def test_the_model_option_stands_in_for_a_missing_model() -> None:
    assert good(line({"messages": MESSAGES}), rules(model="other")).model == "other"


def test_a_bad_set_says_where_it_comes_from() -> None:
    assert "the submit's own options set it" in bad(chat(), rules(sets={"temperature": 9})).message


def test_sets_are_json_or_else_text() -> None:
    assert parse_sets(["temperature=0", "user=me", 'stop=["a"]', "x=a=b", "y=", 'z="1"', "é=ü"]) == {
        "temperature": 0,
        "user": "me",
        "stop": ["a"],
        "x": "a=b",
        "y": "",
        "z": "1",
        "é": "ü",
    }


@pytest.mark.parametrize("pair", ["temperature", "=0", "", "x=\udcff"])
def test_a_set_without_name_value_or_text_is_refused(pair: str) -> None:
    with pytest.raises(BadInput, match="--set"):
        parse_sets([pair])
