"""The embedder that the settings name, as the semantic cache calls it: one on this machine, or an endpoint's."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from cache.embedder import OnnxEmbedder
from cache.score import Vectors
from inference.embeddings import PATH
from inference.endpoint import Endpoint
from runtime.errors import Permanent, Transient
from runtime.settings import CacheSettings

TEXTS_AT_ONCE = 128


class LocalEmbedder:
    """An ONNX model in a thread of this process."""

    def __init__(self, settings: CacheSettings, *, threads: int = 2) -> None:
        self._embedder = OnnxEmbedder(settings.embedder, threads=threads)
        self.id = self._embedder.id

    async def __call__(self, texts: Sequence[str]) -> Vectors:
        """One vector of length 1 for each text, in order."""
        return await asyncio.to_thread(self._embedder.embed, texts)


class EndpointEmbedder:
    """A server that speaks /v1/embeddings. Its id is its address and what it calls its model."""

    def __init__(self, endpoint: Endpoint, *, model: str) -> None:
        self._endpoint = endpoint
        self._model = model
        self.id = f"endpoint-{hashlib.sha256(f'{endpoint.url} {model}'.encode()).hexdigest()[:16]}"

    async def __call__(self, texts: Sequence[str]) -> Vectors:
        """As LocalEmbedder. Raises what Endpoint.post raises, and Permanent for what is no embedding."""
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate(await asyncio.gather(*(self._ask(part) for part in parts)))

    async def _ask(self, texts: Sequence[str]) -> Vectors:
        body = msgspec.json.encode({"model": self._model, "input": list(texts), "encoding_format": "float"})
        try:
            reply = await self._endpoint.post(PATH, body, request_id="cache")
        except Transient as error:  # an embedder's outage is not the engine's
            raise Transient(str(error), retry_after_s=error.retry_after_s) from error
        except Permanent as error:
            if error.code == "timeout":
                raise Transient(str(error)) from error
            raise
        try:
            items = sorted(_DECODER.decode(reply.body).data, key=lambda item: item.index)
            vectors = np.array([item.embedding for item in items], dtype=np.float32)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError(f"{len(items)} vectors for {len(texts)} texts")
        except ValueError as error:  # msgspec's errors are ValueErrors
            raise Permanent(
                f"{self._endpoint.url} answered {reply.status_code}, no embeddings: {error}", code="invalid_response"
            ) from error
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


class _Item(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Items(msgspec.Struct):
    data: list[_Item]


_DECODER = msgspec.json.Decoder(_Items)
