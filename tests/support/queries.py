"""Queries about a few topics, and vectors that tell the topics apart: what an embedder gives, without its cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from cache.score import Vectors
from tests.support.scripted_answers import digest

DIMENSIONS = 32
TOPICS = ("refund", "card", "transfer", "login")
_OPENINGS = ("please help with my", "a question about the", "something is wrong with this", "tell me more of the")


def queries(count: int, *, seed: int = 0) -> list[str]:
    """As many different ones; the topic is their last word."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = set[str]()
    while len(made) < count:
        word = "".join(draw.choices(letters, k=6))
        made.add(f"{draw.choice(_OPENINGS)} {word} {draw.choice(TOPICS)}")
    return draw.sample(sorted(made), count)


class TopicEmbedder:
    """A direction for each topic, and a little of its own for each text. `calls` counts the texts."""

    id = "topics"

    def __init__(self) -> None:
        self.texts = 0

    async def __call__(self, texts: Sequence[str]) -> Vectors:
        self.texts += len(texts)
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> Vectors:
        topic, own = (np.random.default_rng(list(digest(part, 8))) for part in (text.rsplit(maxsplit=1)[-1], text))
        vector = topic.standard_normal(DIMENSIONS) + 0.3 * own.standard_normal(DIMENSIONS)
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)
