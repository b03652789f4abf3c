"""Finding passages: by meaning, by words, or by both fused; the default is what finds most (benchmarks.retrieval).

Chroma is asked first and only for ids. Where it is away or was emptied, or a passage has not reached it yet, the
vectors in Postgres are compared one by one: the same answer, slower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache.index import Emptied, Index
from cache.score import Vectors
from documents.fusion import fuse
from pipeline.indexing import PAGE_PASSAGES, as_vectors
from pipeline.semantic import Embedder
from runtime.errors import Permanent, ServiceUnreachable
from runtime.logs import get_logger
from store.database import Database
from store.documents import StoredCollection, collection_named
from store.passages import (
    FoundPassage,
    find_passages,
    living_passages,
    mark_lost,
    rank_by_words,
    removals_of,
    vectors_of_document,
    vectors_page,
)

log = get_logger(__name__)

DEPTH: Final = 50  # of each ranking before they are fused; see benchmarks.retrieval
PAGE_VECTORS: Final = 5_000  # 8 MB of 384 dimensions
DIGITS: Final = 5  # of a cosine by which passages are told apart: Chroma and numpy differ in the seventh


class SearchMode(StrEnum):
    """How passages are ranked. fused: by the places that they have in both other rankings."""

    DENSE = "dense"
    TEXT = "text"
    FUSED = "fused"


DEFAULT_MODE: Final = SearchMode.FUSED


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found; `score` is its cosine, its rank by words or their fusion, `cosine` where known."""

    passage: FoundPassage
    score: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class _Ranking:
    ids: list[int]
    scores: list[float]


class Library:
    """One process's way to all collections. `index` is None where no Chroma is set."""

    def __init__(self, database: Database, index: Index | None, embed: Embedder) -> None:
        self._database = database
        self._index = index
        self._embed = embed

    async def search(
        self, queries: Sequence[str], *, tenant: str, collection: str, top_k: int, mode: SearchMode = DEFAULT_MODE
    ) -> list[list[Hit]]:
        """The `top_k` best passages for each query, best first; fewer if there are fewer.

        Raises NotFound for an unknown collection, Permanent if another embedder made its vectors.
        """
        vectors = None if mode is SearchMode.TEXT else await self._embed(queries)
        return await asyncio.to_thread(self._search, queries, vectors, (tenant, collection), top_k=top_k, mode=mode)

    async def search_document(self, query: str, *, document_id: int, tenant: str, top_k: int) -> list[Hit]:
        """The `top_k` passages of one document that are nearest to a query, best first."""
        [vector] = await self._embed([query])
        return await asyncio.to_thread(self._search_document, vector, document_id, tenant, top_k)

    def _search(
        self,
        queries: Sequence[str],
        vectors: Vectors | None,
        place: tuple[str, str],
        *,
        top_k: int,
        mode: SearchMode,
    ) -> list[list[Hit]]:
        tenant, collection = place
        with self._database.transaction() as session:
            stored = collection_named(session, tenant, collection)
        words = dense = [_Ranking([], [])] * len(queries)
        if vectors is not None and stored.embedder is not None:
            self._expect(stored.embedder)
            dense = self._by_meaning(stored, vectors)
        if mode is not SearchMode.DENSE:
            words = [self._by_words(stored, query) for query in queries]
        merged = [_merged(*both, mode=mode, top_k=top_k) for both in zip(dense, words, strict=True)]
        return self._hits(merged, dense, tenant=tenant)

    def _search_document(self, vector: NDArray[np.float32], document_id: int, tenant: str, top_k: int) -> list[Hit]:
        with self._database.transaction() as session:
            embedder, ids, stored = vectors_of_document(session, document_id)
        if not ids:
            return []
        self._expect(embedder)
        ranking = _top(ids, as_vectors(stored, len(ids)) @ vector)
        best = list(zip(ranking.ids, ranking.scores, strict=True))[:top_k]
        [hits] = self._hits([best], [ranking], tenant=tenant)
        return hits

    def _expect(self, embedder: str | None) -> None:
        if embedder != self._embed.id:
            raise Permanent(
                f"the vectors of this collection are of the embedder {embedder}, and this one is {self._embed.id}; "
                "name the first in STOKER_CACHE__EMBEDDER, or add its documents to a new collection",
                code="other_embedder",
            )

    def _by_meaning(self, collection: StoredCollection, vectors: Vectors) -> list[_Ranking]:
        if self._index is not None:
            with self._database.transaction() as session:
                gone = removals_of(session, collection.index_name, limit=PAGE_PASSAGES)  # they would take places
            try:
                near = self._index.nearest(collection.index_name, vectors, count=DEPTH + len(gone))
            except Emptied:
                with self._database.transaction() as session:
                    mark_lost(session, collection.id)  # the documents node tells Chroma again
            except ServiceUnreachable as error:
                log.warning("chroma_waits", error=str(error))
            else:
                found = self._living([_Ranking(one.ids.tolist(), one.cosines.tolist()) for one in near])
                fresh = self._compared(collection, vectors, unindexed=True)
                return [_joined(one, other) for one, other in zip(found, fresh, strict=True)]
        return self._compared(collection, vectors, unindexed=False)

    def _living(self, rankings: Sequence[_Ranking]) -> list[_Ranking]:
        """Without passages that are gone and that Chroma still has."""
        with self._database.transaction() as session:
            alive = living_passages(session, [one for ranking in rankings for one in ranking.ids])
        return [_best(pair for pair in zip(one.ids, one.scores, strict=True) if pair[0] in alive) for one in rankings]

    def _compared(self, collection: StoredCollection, vectors: Vectors, *, unindexed: bool) -> list[_Ranking]:
        """Every passage, or those that Chroma lacks, compared with each query."""
        rankings = [_Ranking([], [])] * len(vectors)
        after = 0
        while True:
            with self._database.transaction() as session:
                ids, stored = vectors_page(
                    session, collection.id, after_id=after, limit=PAGE_VECTORS, unindexed=unindexed
                )
            if not ids:
                return rankings
            after = ids[-1]
            cosines: NDArray[np.float32] = vectors @ as_vectors(stored, len(ids)).T
            rankings = [_joined(one, _top(ids, row)) for one, row in zip(rankings, cosines, strict=True)]

    def _by_words(self, collection: StoredCollection, query: str) -> _Ranking:
        with self._database.transaction() as session:
            found = rank_by_words(session, collection.id, query, limit=DEPTH)
        return _Ranking([one for one, _ in found], [rank for _, rank in found])

    def _hits(
        self, ranked: Sequence[Sequence[tuple[int, float]]], dense: Sequence[_Ranking], *, tenant: str
    ) -> list[list[Hit]]:
        with self._database.transaction() as session:
            passages = find_passages(session, [one for best in ranked for one, _ in best], tenant=tenant)
        cosines = [dict(zip(one.ids, one.scores, strict=True)) for one in dense]
        return [
            [Hit(passages[one], score, known.get(one)) for one, score in best if one in passages]
            for best, known in zip(ranked, cosines, strict=True)
        ]


def _merged(dense: _Ranking, words: _Ranking, *, mode: SearchMode, top_k: int) -> list[tuple[int, float]]:
    if mode is SearchMode.FUSED:
        return fuse([dense.ids, words.ids], most=top_k)
    one = dense if mode is SearchMode.DENSE else words
    return list(zip(one.ids, one.scores, strict=True))[:top_k]


def _top(ids: Sequence[int], cosines: NDArray[np.float32]) -> _Ranking:
    best = np.lexsort((np.asarray(ids), -np.round(cosines, DIGITS)))[:DEPTH]
    return _Ranking([ids[at] for at in best], [float(cosines[at]) for at in best])


def _joined(one: _Ranking, other: _Ranking) -> _Ranking:
    if not other.ids:
        return one
    known = dict(zip(one.ids, one.scores, strict=True)) | dict(zip(other.ids, other.scores, strict=True))
    return _best(known.items())


def _best(scored: Iterable[tuple[int, float]]) -> _Ranking:
    """The first of them; those that are alike in the order of their ids, whoever compared them."""
    best = sorted(scored, key=lambda pair: (-round(pair[1], DIGITS), pair[0]))[:DEPTH]
    return _Ranking([identifier for identifier, _ in best], [score for _, score in best])
