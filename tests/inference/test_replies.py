"""What becomes of everything that a server may answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.endpoint import Reply
from inference.replies import result_of
from models.jobs import JobResult, Usage
from models.states import Outcome, Source

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


def judged(body: object, *, path: str = CHAT, status_code: int = 200) -> JobResult:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return result_of(7, path, Reply(status_code=status_code, body=content, duration_ms=12))


def chat(*messages: dict[str, Any], finish_reason: str | None = "stop", usage: object = None) -> dict[str, Any]:
    choices = [{"index": 0, "finish_reason": finish_reason, "message": message} for message in messages]
    return {"id": "x", "choices": choices, "usage": usage}


def test_a_whole_answer_succeeds_and_is_kept_byte_for_byte() -> None:
    body = b'{ "choices": [{"message": {"content": "caf\\u00e9 \\u0000"}, "finish_reason": "stop"}] }'

    assert judged(body) == JobResult(
        seq=7,
        outcome=Outcome.SUCCEEDED,
        source=Source.ENGINE,
        status_code=200,
        response=body.decode(),
        duration_ms=12,
    )


@pytest.mark.parametrize(
    ("message", "finish_reason", "outcome"),
    [
        ({"content": "yes"}, "stop", Outcome.SUCCEEDED),
        ({"content": "yes"}, None, Outcome.SUCCEEDED),
        ({"content": "yes"}, "length", Outcome.TRUNCATED),
        ({"content": None}, "length", Outcome.TRUNCATED),
        ({"content": None}, "stop", Outcome.EMPTY),
        ({"content": ""}, "stop", Outcome.EMPTY),
        ({"content": " \n\t "}, "stop", Outcome.EMPTY),
        ({}, "stop", Outcome.EMPTY),
        ({"content": None, "reasoning": "hm"}, "stop", Outcome.EMPTY),
        ({"content": "", "reasoning_content": "hm"}, "stop", Outcome.EMPTY),
        ({"content": [{"type": "thinking", "text": "hm"}]}, "stop", Outcome.EMPTY),
        ({"content": [{"type": "text", "text": "yes"}]}, "stop", Outcome.SUCCEEDED),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", Outcome.SUCCEEDED),
        ({"content": None, "tool_calls": []}, "stop", Outcome.EMPTY),
        ({"content": None, "function_call": {"name": "f"}}, "stop", Outcome.SUCCEEDED),
        ({"content": None, "refusal": "no"}, "stop", Outcome.SUCCEEDED),
        ({"content": "", "tool_calls": None, "refusal": None}, "content_filter", Outcome.EMPTY),
    ],
)
def test_the_outcome_of_a_chat(message: dict[str, Any], finish_reason: str | None, outcome: Outcome) -> None:
    assert judged(chat(message, finish_reason=finish_reason)).outcome == outcome


def test_one_choice_with_content_is_enough_and_one_cut_short_too_many() -> None:
    assert judged(chat({"content": ""}, {"content": "yes"})).outcome == Outcome.SUCCEEDED
    cut = chat({"content": "yes"}, {"content": "ye"})
    cut["choices"][1]["finish_reason"] = "length"
    assert judged(cut).outcome == Outcome.TRUNCATED


@pytest.mark.parametrize(
    ("text", "finish_reason", "outcome"),
    [("yes", "stop", Outcome.SUCCEEDED), ("", "stop", Outcome.EMPTY), ("", "length", Outcome.TRUNCATED)],
)
def test_the_outcome_of_a_completion(text: str, finish_reason: str, outcome: Outcome) -> None:
    body = {"choices": [{"text": text, "finish_reason": finish_reason}]}

    assert judged(body, path=COMPLETIONS).outcome == outcome


def test_embeddings_succeed_unless_there_are_none() -> None:
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    some = judged({"data": [{"index": 0, "embedding": [0.5]}], "usage": usage}, path=EMBEDDINGS)

    assert (some.outcome, some.usage) == (Outcome.SUCCEEDED, Usage(prompt_tokens=3))
    assert judged({"data": []}, path=EMBEDDINGS).outcome == Outcome.EMPTY


def test_a_path_of_unknown_form_succeeds_with_any_object() -> None:
    assert judged({"output": []}, path="/v1/responses").outcome == Outcome.SUCCEEDED


def test_usage_has_its_cached_and_reasoning_tokens() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }

    assert judged(chat({"content": "yes"}, usage=usage)).usage == Usage(100, 20, 64, 5)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, Usage()),
        ({}, Usage()),
        ("many", Usage()),
        ({"prompt_tokens": 3.0, "completion_tokens": None}, Usage(prompt_tokens=3)),
        ({"prompt_tokens": -1, "completion_tokens": 10**20}, Usage(completion_tokens=2**31 - 1)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, Usage(prompt_tokens=3)),
    ],
)
def test_a_good_answer_is_not_lost_over_strange_usage(usage: object, expected: Usage) -> None:
    result = judged(chat({"content": "yes"}, usage=usage))

    assert (result.outcome, result.usage) == (Outcome.SUCCEEDED, expected)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[1]",
        b"null",
        b'{"choices": 1}',
        b'{"choices": [{"finish_reason": "stop"}]}',
        b'{"error": {"message": "no capacity"}}',
        b'{"choices": [{"message": {"content": "cut off',
        b'{"choices": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\x00\xff",
    ],
)
def test_success_without_the_expected_json_is_a_failure_that_shows_what_came(body: bytes) -> None:
    result = judged(body)

    assert (result.outcome, result.error_code, result.status_code) == (Outcome.FAILED, "invalid_response", 200)
    assert result.response is None
    assert result.error_message is not None
    assert body[:10].decode(errors="replace").replace("\0", "").strip() in result.error_message
    assert len(result.error_message) <= 500
    assert "\0" not in result.error_message


def test_a_lone_surrogate_stays_an_escape() -> None:
    choices = b'[{"message":{"content":"smile \\ud83d"},"finish_reason":"length"}]'
    result = judged(b'{"choices":' + choices + b',"usage":{"prompt_tokens":2}}')

    assert (result.outcome, result.usage.prompt_tokens) == (Outcome.TRUNCATED, 2)
    assert result.response is not None
    assert result.response.isascii()
    assert json.loads(result.response)["choices"][0]["message"]["content"] == "smile \ud83d"


def test_nan_becomes_null() -> None:
    result = judged(b'{"choices":[{"message":{"content":"yes"},"logprobs":[NaN,-Infinity]}]}')

    assert result.outcome == Outcome.SUCCEEDED
    assert '"logprobs": [null, null]' in (result.response or "")


def test_invalid_utf8_is_replaced() -> None:
    result = judged(b'{"choices":[{"message":{"content":"caf\xe9"}}]}')

    assert result.outcome == Outcome.SUCCEEDED
    assert "caf\ufffd" in (result.response or "")


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"message": "too long", "type": "BadRequestError", "code": 400}}, "BadRequestError", "too long"),
        ({"error": {"message": "no", "type": "t", "code": "model_not_found"}}, "model_not_found", "no"),
        ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400},
         "BadRequestError", "too long"),
        ({"error": "overloaded"}, "http_400", "overloaded"),
        ({"detail": "Not Found"}, "http_400", "Not Found"),
        ({"detail": [{"loc": ["body"]}]}, "http_400", '[{"loc": ["body"]}]'),
        ({"error": {"message": None}}, "http_400", '{"message": null}'),
        ({"error": {"message": "a\x00b \ud83d"}}, "http_400", "a b ?"),
        (["odd"], "http_400", '["odd"]'),
        ("odd", "http_400", "odd"),
    ],
)  # fmt: skip
def test_a_rejection_keeps_its_body_and_says_its_code(body: object, code: str, message: str) -> None:
    result = judged(body, status_code=400)

    assert (result.outcome, result.status_code) == (Outcome.FAILED, 400)
    assert (result.error_code, result.error_message) == (code, message)
    assert json.loads(result.response or "") == body


@pytest.mark.parametrize("body", [b"", b"<html>nginx</html>", b"\x00\xff", b"[" * 100_000])
def test_a_rejection_that_is_no_json_is_wrapped(body: bytes) -> None:
    result = judged(body, status_code=413)

    assert result.error_code == "http_413"
    assert json.loads(result.response or "")["error"]["message"] == result.error_message


@given(body=st.binary(max_size=200), path=st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS, "/v1/other"]),
       status_code=st.sampled_from([200, 400, 404]))  # fmt: skip
def test_no_bytes_at_all_raise(body: bytes, path: str, status_code: int) -> None:
    result = judged(body, path=path, status_code=status_code)

    assert result.response is None or "\0" not in result.response


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "text", "data", "usage", "error", "code", "detail"]),
            children,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(value=json_values, path=st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS, "/v1/other"]),
       status_code=st.sampled_from([200, 400]))  # fmt: skip
def test_no_json_at_all_raises_and_what_is_kept_is_json_that_a_text_column_takes(
    value: object, path: str, status_code: int
) -> None:
    result = judged(value, path=path, status_code=status_code)

    for text in (result.response, result.error_code, result.error_message):
        if text is not None:
            assert "\0" not in text.encode().decode()
    if result.response is not None:
        json.loads(result.response)
