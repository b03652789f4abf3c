"""Rankings made one: reciprocal rank fusion. It knows places in rankings only, never what is ranked or any score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Cormack, Clarke, Büttcher: Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods,
# SIGIR 2009: fixed there at 60 by a pilot, and "not critical".
_K: Final = 60


def fuse(rankings: Sequence[Sequence[int]], *, most: int) -> list[tuple[int, float]]:
    """The `most` best of what the rankings name, best first, each with the sum of its 1 / (60 + rank).

    Ranks count from 1. One that a ranking names twice counts at its better rank there. Among equals, the one that
    comes first in the first ranking that has any of them."""
    scores: dict[int, float] = {}  # in the order of the rankings, which sorting keeps among equals
    for ranking in rankings:
        for rank, named in enumerate(dict.fromkeys(ranking), start=1):
            scores[named] = scores.get(named, 0.0) + 1 / (_K + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])[: max(0, most)]
