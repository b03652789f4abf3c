"""Embedders as the semantic cache calls them: the small one on this machine, and a server's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from cache.score import Vectors
from inference.endpoint import Endpoint
from pipeline.embedders import EndpointEmbedder, LocalEmbedder
from runtime.errors import BadInput, Permanent
from runtime.settings import CacheSettings
from tests.support.scripted_answers import vector_of
from tests.support.scripted_endpoint import ScriptedEndpoint

TEXTS = ["I lost my card", "my card is gone", "what is the exchange rate?", "x" * 3000]


def test_the_small_embedder_puts_like_texts_near_and_keeps_their_order() -> None:
    embedder = LocalEmbedder(CacheSettings())
    vectors = asyncio.run(embedder(TEXTS))
    assert vectors.shape == (4, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert vectors[0] @ vectors[1] > 0.7 > vectors[0] @ vectors[2]
    assert np.allclose(asyncio.run(embedder([TEXTS[2]]))[0], vectors[2], atol=0.05)
    assert embedder.id.startswith("onnx-")


def test_a_missing_embedder_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="make embedder"):
        LocalEmbedder(CacheSettings(embedder=tmp_path))


def test_a_servers_vectors_come_in_order_with_length_1_and_under_its_own_id() -> None:
    async def embed(url: str, texts: list[str]) -> Vectors:
        async with Endpoint(url, api_key=None, timeout_s=5.0, connections=2) as endpoint:
            return await EndpointEmbedder(endpoint, model="scripted")(texts)

    with ScriptedEndpoint() as server:
        texts = [f"text {number}" for number in range(300)]
        vectors = asyncio.run(embed(server.url, [*texts, "[[swap]] a"]))
        expected = np.array([vector_of(text) for text in texts])
        assert np.allclose(vectors[:300], expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
        assert server.calls().count == 3
        with pytest.raises(Permanent, match="no embeddings"):
            asyncio.run(embed(server.url, ["[[not json]]"]))
        one, other = (
            EndpointEmbedder(Endpoint(server.url, api_key=None, timeout_s=1.0, connections=1), model=model).id
            for model in ("a", "b")
        )
        assert one != other
