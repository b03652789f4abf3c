"""Exact keys: what may differ between two requests with one key, and what may not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.keys import KEY_BYTES, Scope, asks_for_one, exact_key, is_deterministic, namespace_key, read_body

CHAT = "/v1/chat/completions"
SCOPE = Scope("acme", CHAT, "smollm2@1234", (0, 0))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-10, 10) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(min_size=1, max_size=10), JSON, max_size=5)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **fields}


def shuffled(value: Any, seed: int) -> Any:
    if isinstance(value, dict):
        names = list(value)
        random.Random(seed).shuffle(names)
        return {name: shuffled(value[name], seed) for name in names}
    return [shuffled(item, seed) for item in value] if isinstance(value, list) else value


@given(BODIES, BODIES, st.integers())
def test_the_order_of_a_requests_fields_is_nothing(body: dict[str, Any], message: dict[str, Any], seed: int) -> None:
    names = list(body)
    random.Random(seed).shuffle(names)
    whole = chat(**{**body, "messages": [message]})
    again = read_body(json.dumps({"messages": shuffled([message], seed), **{name: whole[name] for name in names}}))
    assert exact_key(whole, SCOPE) == exact_key({**whole, **again}, SCOPE)
    assert exact_key(whole, SCOPE) == exact_key(dict(reversed({**whole, **again}.items())), SCOPE)
    assert len(exact_key(whole, SCOPE)) == KEY_BYTES


def test_the_order_of_a_schemas_properties_counts() -> None:
    def asked(*names: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        return chat(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})

    assert exact_key(asked("why", "answer"), SCOPE) != exact_key(asked("answer", "why"), SCOPE)
    assert exact_key(asked("why", "answer"), SCOPE) == exact_key(asked("why", "answer"), SCOPE)


@given(BODIES, BODIES)
def test_bodies_that_differ_in_an_unknown_field_have_different_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    left, right = chat(extra=[one]), chat(extra=[other])
    if json.dumps(one) == json.dumps(other):
        assert exact_key(left, SCOPE) == exact_key(right, SCOPE)
    elif one != other:
        assert exact_key(left, SCOPE) != exact_key(right, SCOPE)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1},
        {"n": None},
        {"top_p": 1.0},
        {"presence_penalty": 0},
        {"stop": None},
        {"stop": []},
        {"logprobs": False},
        {"tools": []},
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"stream": False},
        {"response_format": {"type": "text"}},
        {"temperature": 0.0},
    ],
)
def test_a_field_at_its_default_or_without_effect_changes_nothing(more: dict[str, Any]) -> None:
    assert exact_key(chat(**more), SCOPE) == exact_key(chat(), SCOPE)


@pytest.mark.parametrize(
    "more",
    [
        {"model": "n"},
        {"temperature": 0.1},
        {"temperature": None},
        {"seed": 1},
        {"max_tokens": 5},
        {"stop": ["x"]},
        {"n": 2},
        {"top_k": 5},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "hi "}]},
        {"messages": [{"role": "system", "content": "hi"}]},
        {"guided_choice": ["a"]},
        {"tools": [{"type": "function"}]},
    ],
)
def test_whatever_can_change_an_answer_changes_the_key(more: dict[str, Any]) -> None:
    assert exact_key(chat(**more), SCOPE) != exact_key(chat(), SCOPE)


def test_true_is_not_one_and_a_text_is_not_a_number() -> None:
    keys = {exact_key(chat(extra=value), SCOPE) for value in (True, 1, "1", [1], {"1": 1})}
    assert len(keys) == 5


@pytest.mark.parametrize(
    "other",
    [
        replace(SCOPE, tenant="other"),
        replace(SCOPE, checkpoint="smollm2@5678"),
        replace(SCOPE, epochs=(1, 0)),
        replace(SCOPE, epochs=(0, 1)),
        replace(SCOPE, endpoint="/v1/completions"),
    ],
)
def test_nothing_crosses_a_scope(other: Scope) -> None:
    assert exact_key(chat(), other) != exact_key(chat(), SCOPE)
    assert namespace_key(chat(), other, template="t", embedder="e") != namespace_key(
        chat(), SCOPE, template="t", embedder="e"
    )


def test_passages_count_and_payloads_do_not_count_in_a_namespace() -> None:
    assert exact_key(chat(), SCOPE, passages=["a"]) != exact_key(chat(), SCOPE)
    other = chat(messages=[{"role": "user", "content": "else"}])
    same = [namespace_key(body, SCOPE, template="t", embedder="e") for body in (chat(), other)]
    assert same[0] == same[1] != namespace_key(chat(top_k=3), SCOPE, template="t", embedder="e")
    assert same[0] != namespace_key(chat(), SCOPE, template="u", embedder="e")
    assert same[0] != namespace_key(chat(), SCOPE, template="t", embedder="f")


def test_only_temperature_0_a_seed_or_an_embedding_is_deterministic() -> None:
    assert is_deterministic({"temperature": 0}, endpoint=CHAT)
    assert is_deterministic({"seed": 0}, endpoint=CHAT)
    assert is_deterministic({}, endpoint="/v1/embeddings")
    assert not is_deterministic({}, endpoint=CHAT)
    assert not is_deterministic({"temperature": 0.2}, endpoint=CHAT)
    assert asks_for_one({"n": None}) and not asks_for_one({"n": 2}) and not asks_for_one({"tools": [1]})
