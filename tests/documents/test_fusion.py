"""Reciprocal rank fusion: what several rankings name early comes first, by the paper's formula."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from documents.fusion import fuse

RANKINGS = st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=4)
UNIQUE = st.lists(st.integers(0, 20), max_size=12, unique=True)


def test_the_score_is_the_sum_of_one_over_sixty_and_the_rank() -> None:
    assert fuse([[7, 8], [8]], most=5) == [(8, 1 / 62 + 1 / 61), (7, 1 / 61)]


def test_equals_stand_as_in_the_first_ranking() -> None:
    assert [named for named, _ in fuse([[1, 2], [2, 1]], most=5)] == [1, 2]
    assert [named for named, _ in fuse([[3], [4], [5]], most=5)] == [3, 4, 5]


def test_nothing_comes_of_no_rankings() -> None:
    assert fuse([], most=5) == []
    assert fuse([[], []], most=5) == []


@given(rankings=RANKINGS, most=st.integers(0, 30))
def test_all_that_is_named_comes_once_best_first_up_to_most(rankings: list[list[int]], most: int) -> None:
    found = fuse(rankings, most=most)
    named = {place for ranking in rankings for place in ranking}
    assert len(found) == min(most, len(named))
    assert len({place for place, _ in found}) == len(found)
    assert {place for place, _ in found} <= named
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


@given(rankings=st.lists(UNIQUE, max_size=4))
def test_the_scores_are_those_of_the_formula(rankings: list[list[int]]) -> None:
    for place, score in fuse(rankings, most=30):
        exact = sum(Fraction(1, 61 + ranking.index(place)) for ranking in rankings if place in ranking)
        assert abs(score - exact) < 1e-12


@given(ranking=UNIQUE)
def test_one_ranking_alone_or_twice_keeps_its_order(ranking: list[int]) -> None:
    assert [place for place, _ in fuse([ranking], most=30)] == ranking
    assert [place for place, _ in fuse([ranking, ranking], most=30)] == ranking


@given(rankings=RANKINGS, most=st.integers(0, 30))
def test_fewer_are_the_first_of_more(rankings: list[list[int]], most: int) -> None:
    assert fuse(rankings, most=most) == fuse(rankings, most=100)[:most]


@given(rankings=st.lists(UNIQUE, min_size=1, max_size=4), place=st.integers(0, 20))
def test_to_be_named_first_by_one_more_ranking_never_harms(rankings: list[list[int]], place: int) -> None:
    def rank(of: list[list[int]]) -> int:
        named = [found for found, _ in fuse(of, most=100)]
        return named.index(place) if place in named else len(named)

    assert rank([*rankings, [place]]) <= rank(rankings)
