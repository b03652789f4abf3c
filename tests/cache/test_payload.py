"""Payloads, templates, and answers as they are compared."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.answers import Kind, answer_text, comparable
from cache.payload import BLANK, LEAST_AFFIX, Affixes, SharedAffixes, declared, prompt_of, split
from runtime.errors import BadInput


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def shared_affixes(prompts: list[str]) -> Affixes:
    """What SharedAffixes finds, from all prompts at once."""
    if len(set(prompts)) < 2:
        return Affixes()
    prefix = _common(prompts)
    suffix = _common([prompt[len(prefix) :][::-1] for prompt in prompts])[::-1]
    return Affixes(*(affix if len(affix) >= LEAST_AFFIX else "" for affix in (prefix, suffix)))


def _common(texts: list[str]) -> str:
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return re.sub(r"\w+\Z", "", "".join(letters[0] for letters in shared))


def test_a_prompt_is_one_turn_of_plain_text() -> None:
    assert prompt_of({"messages": [user("hi")]}) == ('["user"]\n', "hi")
    instructed = [[{"role": role, "content": "be short"}, user("hi")] for role in ("system", "developer")]
    instructed.append([user("be short\nhi")])
    read = [prompt_of({"messages": messages}) for messages in instructed]
    assert [text for _, text in filter(None, read)] == ["hi", "hi", "be short\nhi"]
    assert len({before for before, _ in filter(None, read)}) == 3, "who said it is part of the template"
    assert prompt_of({"prompt": "hi"}) == ("", "hi")
    for other in (
        {"messages": [user("hi"), {"role": "assistant", "content": "yes"}, user("and?")]},
        {"messages": [user([{"type": "image_url"}])]},
        {"messages": [user("a"), user("b")]},
        {"messages": [{"role": "user", "content": "hi", "name": "me"}]},
        {"prompt": ["a", "b"]},
        {"input": "x"},
    ):
        assert prompt_of(other) is None


def test_a_declared_template_gives_its_variables_as_payload() -> None:
    found = declared("Say A to B.", template="Say {what} to {whom}.", variables={"what": "A", "whom": "B"})
    assert found.payload == '["A","B"]'
    assert BLANK in found.template
    other = declared("Say C to D.", template="Say {what} to {whom}.", variables={"what": "C", "whom": "D"})
    assert other.template == found.template


@pytest.mark.parametrize(
    ("template", "variables", "says"),
    [
        ("Say A.", {}, "has no slot"),
        ("Say {x}.", {}, "no value for x"),
        ("Say {x}.", {"x": "A", "y": "B"}, "no slot for y"),
        ("Say {x}!", {"x": "A"}, "does not give the text"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_its_remedy(
    template: str, variables: dict[str, str], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        declared("Say A.", template=template, variables=variables)


def test_the_prefix_and_suffix_of_a_batch_are_found_at_words_ends() -> None:
    prompts = [
        f"Classify this customer query: {text}\nAnswer with one label only." for text in ("card", "cash", "carp")
    ]
    affixes = shared_affixes(prompts)
    assert affixes == Affixes("Classify this customer query: ", "\nAnswer with one label only.")
    found = split(prompts[0], affixes)
    assert found is not None
    assert found.payload == "card"
    assert split("Classify this customer query: x", affixes) is None
    assert shared_affixes(["where is my card", "where is my cash"]) == Affixes()


@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=10), st.text(max_size=40), st.text(max_size=40))
def test_a_split_gives_back_the_prompt(texts: list[str], before: str, after: str) -> None:
    prompts = [f"{before}{text}{after}" for text in texts]
    affixes = shared_affixes(prompts)
    for prompt in prompts:
        found = split(prompt, affixes)
        assert found is None or f"{affixes.prefix}{found.payload}{affixes.suffix}" == prompt


def test_a_long_prompt_without_a_template_has_no_payload() -> None:
    assert split("word " * 300, Affixes()) is None


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (" card_arrival\n", "card_arrival", Kind.LABEL),
        ("1.0", "1", Kind.NUMBER),
        ('{"a": 1, "b": [2]}', '{"b":[2.0],"a":1}', Kind.JSON),
    ],
)
def test_answers_that_mean_the_same_have_one_form(one: str, other: str, kind: Kind) -> None:
    assert comparable(one) == comparable(other)
    assert comparable(one)[0] is kind


def test_labels_are_exact_and_long_text_is_free() -> None:
    assert comparable("Yes") != comparable("yes") != comparable("Yes.")
    assert comparable("word " * 40)[0] is Kind.FREE
    assert comparable("a\nb")[0] is Kind.FREE
    assert comparable("")[0] is Kind.FREE


def test_only_one_whole_plain_answer_has_a_text() -> None:
    def response(finish: str = "stop", **message: Any) -> str:
        return json.dumps({"choices": [{"finish_reason": finish, "message": {"content": "yes", **message}}]})

    assert answer_text(response()) == "yes"
    assert answer_text('{"choices": [{"text": "yes", "finish_reason": "stop"}]}') == "yes"
    for other in (
        response("length"),
        response("content_filter"),
        response(refusal="no"),
        response(tool_calls=[{}]),
        '{"choices": []}',
        "no json",
    ):
        assert answer_text(other) is None


@given(
    st.text("ab _.", max_size=40),
    st.text("ab _.", max_size=40),
    st.lists(st.text("ab _.", max_size=6), max_size=6),
    st.lists(st.text("ab _.", max_size=60), max_size=1),
)
def test_affixes_found_one_by_one_are_those_of_the_whole_list(
    prefix: str, suffix: str, payloads: list[str], others: list[str]
) -> None:
    prompts = [*(prefix + payload + suffix for payload in payloads), *others]
    shared = SharedAffixes()
    for seen, prompt in enumerate(prompts, 1):
        shared.add(prompt)
        assert shared.affixes() == shared_affixes(prompts[:seen])
    assert shared.affixes() == shared_affixes(prompts)
