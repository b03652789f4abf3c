"""Which vectors are near: one Chroma collection a namespace, or a collection of passages, in a Chroma server.

It holds ids and vectors only.

A filter on metadata is 10 to 30 times slower than a collection of its own (measured), so there is none. What it
answers is a hint: whether an entry may still answer is Postgres's to say. It may be emptied at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import chromadb
import httpx
import numpy as np
from chromadb.config import Settings as ChromaSettings
from chromadb.errors import ChromaError, NotFoundError
from chromadb.utils.embedding_functions import known_embedding_functions, sparse_known_embedding_functions
from numpy.typing import NDArray

from cache.score import Floats, Vectors
from runtime.errors import BadInput, ServiceUnreachable

TIMEOUT_S: Final = 5.0
REST_S: Final = 5.0  # after a failure, so that a server which hangs does not slow every shard
ADDED_AT_ONCE: Final = 1_000
# So Chroma 1.5 says of a collection whose first entries are being added at this moment.
_UNWRITTEN: Final = "Nothing found on disk"
# The rest is as shipped: a lower ef_search gains 0.1 ms a lookup and loses recall (measured at 100,000 entries).
_CONFIGURATION: Final = {"hnsw": {"space": "cosine"}}


class Emptied(Exception):
    """The server has no collection of this namespace: it has few entries, was cleared, or the server was emptied."""


@dataclass(frozen=True, slots=True)
class Near:
    """The nearest entries of one lookup, nearest first."""

    ids: NDArray[np.int64]
    cosines: Floats


NOTHING: Final = Near(np.empty(0, np.int64), np.empty(0))


class Index:
    """The collections of one server; several threads may use it. Make it after a fork.

    Every method raises ServiceUnreachable while the server does not answer, for REST_S without asking it.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BadInput("STOKER_CACHE__CHROMA_URL: write http://host:port")
        self._url = f"{parts.scheme}://{parts.hostname}:{parts.port or 8000}"
        self._place = {"host": parts.hostname, "port": parts.port or 8000, "ssl": parts.scheme == "https"}
        self._timeout_s = timeout_s
        self._client: Any = None
        self._collections: dict[str, Any] = {}
        self._rests_until = 0.0

    def probe(self) -> None:
        """Nothing, if the server answers."""
        with self._reached():
            self._connected().heartbeat()

    def nearest(self, name: str, vectors: Vectors, *, count: int) -> list[Near]:
        """The `count` nearest entries of each vector, fewer if there are fewer. Raises Emptied."""
        with self._reached(name):
            try:
                found = self._with(
                    name, lambda one: one.query(query_embeddings=vectors, n_results=count, include=["distances"])
                )
            except ChromaError as error:
                if _UNWRITTEN not in str(error):
                    raise
                return [NOTHING] * len(vectors)
        return [
            Near(np.array(ids, dtype=np.int64), 1.0 - np.array(distances, dtype=np.float64))
            for ids, distances in zip(found["ids"], found["distances"], strict=True)
        ]

    def make(self, name: str) -> None:
        """Let there be a collection of a namespace."""
        with self._reached(name):
            self._collections[name] = self._connected().get_or_create_collection(
                name, configuration=_CONFIGURATION, embedding_function=None
            )

    def add(self, name: str, ids: Sequence[int], vectors: Vectors) -> None:
        """Add entries; adding one again changes nothing. Raises Emptied: only `make` makes a collection."""
        with self._reached(name):
            for start in range(0, len(ids), ADDED_AT_ONCE):
                part = slice(start, start + ADDED_AT_ONCE)
                named = [str(one) for one in ids[part]]
                self._with(name, lambda one: one.upsert(ids=named, embeddings=vectors[part]))  # noqa: B023  # called here

    def remove(self, name: str, ids: Sequence[int]) -> None:
        """Take entries out; harmless for those that are not there. Raises Emptied."""
        with self._reached(name):
            for start in range(0, len(ids), ADDED_AT_ONCE):
                named = [str(one) for one in ids[start : start + ADDED_AT_ONCE]]
                self._with(name, lambda one: one.delete(ids=named))  # noqa: B023  # called here

    def size(self, name: str) -> int:
        """How many entries a namespace has here. Raises Emptied."""
        with self._reached(name):
            return int(self._with(name, lambda one: one.count()))

    def drop(self, name: str) -> None:
        """Forget a namespace; harmless if there is none."""
        with self._reached(name):
            self._collections.pop(name, None)
            try:
                self._connected().delete_collection(name)
            except NotFoundError:
                return

    def _connected(self) -> Any:
        if self._client is None:
            # chromadb sets no timeout and has no setting for one: its first requests go, at once, only to a server that
            # has just answered, and the rest have ours.
            httpx.get(f"{self._url}/api/v2/heartbeat", timeout=self._timeout_s).raise_for_status()
            # A collection may name a class which the client makes here, with arguments that stand there too: who writes
            # to Chroma would run code in this process. We embed ourselves, so no name leads to a class.
            known_embedding_functions.clear()
            sparse_known_embedding_functions.clear()
            client = chromadb.HttpClient(**self._place, settings=ChromaSettings(anonymized_telemetry=False))
            client._server._session.timeout = httpx.Timeout(self._timeout_s)
            self._client = client
        return self._client

    def _with(self, name: str, use: Callable[[Any], Any]) -> Any:
        """Use a collection; one that we know and that is gone may have been made again by others since."""
        known = self._collections.get(name)
        if known is not None:
            try:
                return use(known)
            except NotFoundError:
                self._collections.pop(name, None)
        self._collections[name] = self._connected().get_collection(name, embedding_function=None)
        return use(self._collections[name])

    @contextmanager
    def _reached(self, name: str = "") -> Iterator[None]:
        if time.monotonic() < self._rests_until:
            raise ServiceUnreachable(f"Chroma at {self._url} did not answer a moment ago")
        try:
            yield
        except NotFoundError as error:
            self._collections.pop(name, None)
            raise Emptied(name) from error
        except (httpx.HTTPError, ChromaError, ValueError) as error:  # ValueError: the client could not connect
            raise self._unreachable(error) from error
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise self._unreachable(error) from error  # so chromadb says that a proxy answered, or the server with 5xx

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        self._client = None
        self._collections.clear()
        self._rests_until = time.monotonic() + REST_S
        return ServiceUnreachable(
            f"Chroma at {self._url} does not answer: {error}; check STOKER_CACHE__CHROMA_URL and that it runs"
        )
