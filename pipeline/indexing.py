"""Telling Chroma of passages: what it lacks, and what is gone. Postgres says which; whatever dies when, the next call
goes on where rows are left.

A collection that Chroma has no more, as after it was emptied, is told to it anew as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from cache.index import Emptied, Index
from runtime.logs import get_logger
from store.database import Database
from store.documents import StoredCollection
from store.passages import (
    forget_removals,
    mark_indexed,
    mark_unindexed,
    removals_of,
    unsynced_collections,
    vectors_page,
)

log = get_logger(__name__)

PAGE_PASSAGES: Final = 1_000


def sync_index(database: Database, index: Index, *, on_progress: Callable[[int], None] = lambda _: None) -> None:
    """Tell Chroma all that it does not know; `on_progress` hears how many passages it has been told of.

    Raises ServiceUnreachable; what is left stays marked. Several processes may do it at once.
    """
    with database.transaction() as session:
        unsynced = unsynced_collections(session)
    for one in unsynced:
        if one.collection_id is None:  # removed with all of its documents
            index.drop(one.index_name)
            with database.transaction() as session:
                forget_removals(session, one.index_name, None)
            continue
        if one.lost:
            with database.transaction() as session:
                mark_unindexed(session, one.collection_id)
        _take_out(database, index, one.index_name)
        _add(database, index, StoredCollection(one.collection_id, one.index_name, None), on_progress)


def rebuild_index(
    database: Database, index: Index, collection: StoredCollection, *, on_progress: Callable[[int], None]
) -> None:
    """Make a collection's vectors in Chroma anew from Postgres."""
    index.drop(collection.index_name)
    with database.transaction() as session:
        mark_unindexed(session, collection.id)
    _add(database, index, collection, on_progress)


def _add(database: Database, index: Index, collection: StoredCollection, on_progress: Callable[[int], None]) -> None:
    told = 0
    while True:
        with database.transaction() as session:
            ids, vectors = vectors_page(session, collection.id, after_id=0, limit=PAGE_PASSAGES, unindexed=True)
        if not ids:
            return
        try:
            index.add(collection.index_name, ids, as_vectors(vectors, len(ids)))
        except Emptied:
            with database.transaction() as session:
                is_wanted = mark_unindexed(session, collection.id)
            if not is_wanted:
                return
            log.info("index_made", collection=collection.id)
            index.make(collection.index_name)
            continue
        with database.transaction() as session:
            alive = mark_indexed(session, ids)
        if gone := [one for one in ids if one not in alive]:  # replaced while they were on their way
            _remove(index, collection.index_name, gone)
        told += len(ids)
        on_progress(told)


def _take_out(database: Database, index: Index, name: str) -> None:
    while True:
        with database.transaction() as session:
            gone = removals_of(session, name, limit=PAGE_PASSAGES)
        if not gone:
            return
        _remove(index, name, gone)
        with database.transaction() as session:
            forget_removals(session, name, gone)


def _remove(index: Index, name: str, gone: Sequence[int]) -> None:
    try:
        index.remove(name, gone)
    except Emptied:
        log.info("index_was_emptied", index=name)


def as_vectors(stored: bytes, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Vectors as they are stored, one after the other: float32, (count, dimensions)."""
    return np.frombuffer(stored, dtype=np.float32).reshape(count, -1)
