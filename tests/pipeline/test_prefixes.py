"""The order that keeps prompts together which begin alike."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from models.states import JobOrder
from pipeline.cutting import cut_ordered
from pipeline.prefixes import BLOCK_BYTES, OrderedJobs, PrefixTree
from runtime.settings import ShardSettings

CHAT = "/v1/chat/completions"
LONG = 6 * BLOCK_BYTES


def body(system: str, question: str, **fields: object) -> bytes:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return json.dumps({"model": "m", **fields, "messages": messages}).encode()


def document(number: int, *, common: str = "") -> str:
    """A text like no other's, some blocks long."""
    words = random.Random(number).choices(["alpha", "beta", "gamma", "delta", "epsilon"], k=LONG // 6)
    return f"{common}document {number}: {' '.join(words)}"


def ordered(
    groups: list[int], *, outputs: list[int] | None = None, order: JobOrder = JobOrder.PREFIX, common: str = ""
) -> tuple[PrefixTree, OrderedJobs, list[int]]:
    """The tree, the order, and the groups in it, of jobs about these documents."""
    tree = PrefixTree(CHAT)
    for place, group in enumerate(groups):
        tree.add("m", body(document(group, common=common), f"question {place}"), outputs[place] if outputs else 8)
    jobs = tree.ordered(order)
    return tree, jobs, [groups[place] for place in jobs.places]


def runs(groups: Sequence[object]) -> int:
    return sum(one != other for one, other in pairwise(groups)) + 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_every_job_is_there_once_and_every_group_is_in_one_piece(groups: list[int]) -> None:
    _, jobs, found = ordered(groups)

    assert sorted(jobs.places) == list(range(len(groups)))
    assert runs(found) == len(set(groups))


@given(st.lists(st.sampled_from(["base", "law", "sql"]), min_size=1, max_size=60))
def test_short_jobs_are_grouped_by_their_model_which_may_be_an_adapter(models: list[str]) -> None:
    tree = PrefixTree(CHAT)
    for number, model in enumerate(models):
        tree.add(model, b"{}", number)
    found = [models[place] for place in tree.ordered().places]
    assert runs(found) == len(set(models))
    assert not tree.is_worth_sorting() or runs(models) > len(set(models)), "those in groups are left as they are"


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_of_a_long_common_beginning_a_job_for_each_block_is_astray_and_no_more(groups: list[int]) -> None:
    common = "You answer questions about documents. " * 20

    _, jobs, found = ordered(groups, common=common)

    assert sorted(jobs.places) == list(range(len(groups)))
    assert runs(found) <= len(set(groups)) + len(common) // BLOCK_BYTES + 1


def test_a_shuffled_file_is_worth_sorting_and_a_grouped_one_is_left_alone() -> None:
    shuffled, grouped = [n % 10 for n in range(200)], [n // 20 for n in range(200)]

    assert ordered(shuffled)[0].is_worth_sorting()
    assert not ordered(grouped)[0].is_worth_sorting()
    assert not ordered([0] * 200)[0].is_worth_sorting()
    assert not ordered(list(range(200)))[0].is_worth_sorting()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 100)), min_size=1, max_size=60))
def test_the_group_with_the_longest_output_comes_first_and_its_longest_one_leads_the_short_order_ends_with_it(
    jobs: list[tuple[int, int]],
) -> None:
    groups, outputs = [group for group, _ in jobs], [tokens for _, tokens in jobs]

    _, long_first, _ = ordered(groups, outputs=outputs)
    _, short_first, last = ordered(groups, outputs=outputs, order=JobOrder.PREFIX_SHORT)

    first_group = [outputs[place] for place in long_first.places if groups[place] == groups[long_first.places[0]]]
    assert max(first_group) == max(outputs)
    assert runs(last) == len(set(groups))
    assert sorted(short_first.places) == sorted(long_first.places)


def test_jobs_of_one_prompt_are_sorted_by_their_output() -> None:
    tree = PrefixTree(CHAT)
    for tokens in (3, 9, 1, 9, 5):
        tree.add("m", body("short", "same"), tokens)

    assert [*tree.ordered().places] == [1, 3, 4, 0, 2]
    assert [*tree.ordered(JobOrder.PREFIX_SHORT).places] == [2, 0, 4, 1, 3]


def test_other_tools_or_another_model_are_another_beginning() -> None:
    tools = [{"type": "function", "function": {"name": f"tool {n}"}} for n in range(2)]
    tree = PrefixTree(CHAT)
    for place in range(40):
        tree.add("m", body(document(1), f"question {place}", tools=[tools[place % 2]]), 8)

    places = [*tree.ordered().places]

    assert tree.is_worth_sorting()
    assert runs([place % 2 for place in places]) == 2


def test_a_line_without_tools_is_not_of_those_with_the_tools_of_the_line_before() -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "look up"}}]}
    tree = PrefixTree(CHAT)
    for place in range(40):
        tree.add("m", body(document(1), f"question {place}", **(tools if place % 3 == 0 else {})), 8)

    places = [*tree.ordered().places]

    assert runs([place % 3 == 0 for place in places]) == 2


def test_what_is_learned_is_bounded_and_what_comes_often_is_not_forgotten() -> None:
    tree = PrefixTree(CHAT, most_nodes=200)
    groups = []
    for place in range(5000):
        group = place % 7 if place % 2 else 1000 + place
        groups.append(group)
        tree.add("m", body(document(group), f"question {place}"), 8)
        assert tree.nodes_known <= 200

    found = [groups[place] for place in tree.ordered().places if groups[place] < 7]

    assert runs(found) == 7


def test_embeddings_keep_the_files_order() -> None:
    tree = PrefixTree("/v1/embeddings")
    for place in range(100):
        tree.add("m", json.dumps({"model": "m", "input": document(place % 3)}).encode(), 0)

    assert not tree.is_worth_sorting()


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=120),
    st.integers(1, 20),
    st.integers(50, 5000),
)
def test_shards_hold_every_job_once_within_their_bounds(groups: list[int], max_jobs: int, max_tokens: int) -> None:
    _, jobs, _ = ordered(groups)

    spans = cut_ordered(jobs, ShardSettings(max_jobs=max_jobs, max_tokens=max_tokens))

    assert [n for first, last, _ in spans for n in range(first, last + 1)] == list(range(len(groups)))
    for first, last, tokens in spans:
        assert last - first < max_jobs
        assert tokens <= max_tokens or first == last


def test_a_shard_ends_between_groups_where_it_can() -> None:
    _, jobs, found = ordered([n % 20 for n in range(600)])  # groups of 30: two of them fill a shard of 64 nearly

    spans = cut_ordered(jobs, ShardSettings(max_jobs=64))

    assert [last - first + 1 for first, last, _ in spans] == [60] * 10
    assert all(found[last] != found[last + 1] for _, last, _ in spans[:-1])
