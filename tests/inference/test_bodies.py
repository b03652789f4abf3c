"""What is read of a body on its way, and what is changed in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.bodies import (
    OUTPUT_TOKENS,
    TOKENS_PER_FILE,
    addressed,
    estimated_prompt_tokens,
    estimated_tokens,
    model_of,
)
from runtime.errors import Permanent

CHAT = b'{"messages": [ {"role":"user","content":"h\\u00e9llo"} ], "model":"ours", "seed": 12345678901234567890123}'
HALF_AN_EMOJI = rb'{"model":"ours","prompt":"\ud83d"}'


def test_the_model_is_replaced_and_all_else_stays_byte_by_byte() -> None:
    sent = addressed(CHAT, model="theirs", streams=False)

    assert json.loads(sent) == {**json.loads(CHAT), "model": "theirs"}
    assert b'[ {"role":"user","content":"h\\u00e9llo"} ]' in sent
    assert b"12345678901234567890123" in sent


def test_a_stream_is_asked_for_with_its_usage() -> None:
    asked = json.loads(addressed(CHAT, model=None, streams=True))

    assert asked["model"] == "ours"
    assert (asked["stream"], asked["stream_options"]) == (True, {"include_usage": True})


def test_a_body_that_only_python_reads_is_addressed_too() -> None:
    assert model_of(HALF_AN_EMOJI) == "ours"
    assert json.loads(addressed(HALF_AN_EMOJI, model="theirs", streams=False)) == {
        "model": "theirs",
        "prompt": "\ud83d",
    }


TOO_DEEP = b'{"prompt":' + b"[" * 100_000


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"3", TOO_DEEP])
def test_what_is_no_object_has_no_model_and_cannot_be_addressed(body: bytes) -> None:
    assert model_of(body) == ""
    assert estimated_tokens(body) >= 0
    with pytest.raises(Permanent) as caught:
        addressed(body, model="theirs", streams=False)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "output_tokens"),
    [
        ({"messages": []}, OUTPUT_TOKENS),
        ({"messages": [], "max_tokens": 10}, 10),
        ({"messages": [], "max_completion_tokens": 20, "max_tokens": 10}, 20),
        ({"messages": [], "max_tokens": 10, "n": 3}, 30),
        ({"prompt": "a", "max_tokens": 10, "best_of": 4}, 40),
        ({"prompt": ["a", "b", "c"], "max_tokens": 10}, 30),
        ({"prompt": [1, 2, 3], "max_tokens": 10}, 10),
        ({"input": ["a", "b"], "model": "e"}, 0),
        ({"messages": [], "max_tokens": "many"}, OUTPUT_TOKENS),
    ],
)
def test_the_most_that_a_request_may_answer_is_estimated(body: dict[str, Any], output_tokens: int) -> None:
    encoded = json.dumps(body).encode()

    assert estimated_tokens(encoded) == estimated_prompt_tokens(encoded) + output_tokens


def test_an_image_counts_as_one_and_not_by_its_base64() -> None:
    def with_images(*images: str) -> bytes:
        return json.dumps({"content": [{"url": f"data:image/png;base64,{image}"} for image in images]}).encode()

    tokens = estimated_prompt_tokens(with_images("A" * 4_000_000, "B" * 4_000_000))

    assert 2 * TOKENS_PER_FILE < tokens < 2 * TOKENS_PER_FILE + 100


@given(st.text(), st.text(), st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.none()))
def test_whatever_it_holds_the_model_is_theirs_and_the_rest_the_same(
    ours: str, theirs: str, rest: dict[str, Any]
) -> None:
    body = json.dumps({**rest, "model": ours}).encode()

    assert model_of(body) == ours
    assert json.loads(addressed(body, model=theirs, streams=False)) == {**rest, "model": theirs}
