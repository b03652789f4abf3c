"""Searching collections: by meaning, by words, by both; with Chroma, without it, and while it is behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import PurePath

import pytest

from cache.index import Index
from pipeline.indexing import rebuild_index
from pipeline.search import DEPTH, Library, SearchMode
from runtime.errors import NotFound, Permanent
from store.database import Database
from store.documents import collection_named, list_collections, remove_collection, remove_documents
from store.passages import highlights
from tests.support.batches import execute
from tests.support.cooking import add, read_all
from tests.support.own_services import OwnChroma, server_folder
from tests.support.queries import TopicEmbedder

TEXTS = {
    "post": "The postman brings a heavy parcel",
    "moon": "Craters cover the silent moon",
    "school": "Two universities teach the old trade of cooking soup",
}


@pytest.fixture(scope="module")
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def index(chroma: OwnChroma) -> Index:
    return Index(chroma.url)


@pytest.fixture
def library(database: Database, index: Index) -> Library:
    """A collection of three documents, which Chroma has."""
    for name, content in TEXTS.items():
        add(database, content, name=name, collection="c")
    read_all(database, index=index)
    return Library(database, index, TopicEmbedder())


def found(library: Library, query: str, *, top_k: int = 1, mode: SearchMode = SearchMode.FUSED) -> list[str]:
    """The documents of the passages that are found, best first."""
    [hits] = asyncio.run(library.search([query], tenant="local", collection="c", top_k=top_k, mode=mode))
    return [PurePath(hit.passage.source).name for hit in hits]


def unindexed(database: Database) -> int:
    with database.transaction() as session:
        return dict(list_collections(session, tenant="local"))["c"].unindexed


def test_each_way_of_searching_finds_what_it_can(library: Library) -> None:
    assert found(library, "about the parcel", mode=SearchMode.DENSE) == ["post"]
    assert found(library, "who is the postman?", mode=SearchMode.TEXT) == ["post"]
    assert found(library, "craters of the moon") == ["moon"]
    assert found(library, "and the of", mode=SearchMode.TEXT) == [], "no word is left to search for"


def test_a_word_is_found_in_each_of_its_forms_and_marked(library: Library, database: Database) -> None:
    assert found(library, "university", mode=SearchMode.TEXT) == ["school"]
    [[hit]] = asyncio.run(
        library.search(["a university"], tenant="local", collection="c", top_k=1, mode=SearchMode.TEXT)
    )
    with database.transaction() as session:
        shown = highlights(session, [hit.passage.id], "a university")[hit.passage.id]
    assert shown == TEXTS["school"].replace("universities", "\x02universities\x03")


def test_a_rare_word_counts_more_than_frequent_ones(library: Library, database: Database, index: Index) -> None:
    for number in range(6):
        add(database, f"The old trade of the heavy postman, number {number}", name=f"more-{number}", collection="c")
    read_all(database, index=index)
    assert found(library, "old heavy trade of universities", mode=SearchMode.TEXT) == ["school"]


def test_without_chroma_the_answers_are_the_same(library: Library, database: Database, chroma: OwnChroma) -> None:
    queries = ["about the parcel", "about the moon", "about the soup"]
    before = [found(library, query, top_k=3) for query in queries]
    alone = Library(database, None, TopicEmbedder())
    assert [found(alone, query, top_k=3) for query in queries] == before
    away = Library(database, Index("http://127.0.0.1:1", timeout_s=1.0), TopicEmbedder())
    assert [found(away, query, top_k=3) for query in queries] == before


def test_an_emptied_chroma_costs_no_answer_and_is_told_again(
    library: Library, database: Database, chroma: OwnChroma, index: Index
) -> None:
    before = found(library, "about the moon", top_k=3)
    chroma.empty()
    chroma.start()
    assert found(library, "about the moon", top_k=3) == before
    assert unindexed(database) == 0, "a search marks the collection and nothing else"
    read_all(database, index=index)
    with database.transaction() as session:
        stored = collection_named(session, "local", "c")
    assert (index.size(stored.index_name), unindexed(database)) == (3, 0)
    told: list[int] = []
    rebuild_index(database, index, stored, on_progress=told.append)
    assert (told, index.size(stored.index_name)) == ([3], 3)


def test_what_chroma_does_not_know_yet_is_found_and_what_is_gone_takes_no_place(
    library: Library, database: Database, index: Index
) -> None:
    add(database, "A second heavy parcel", name="new", collection="c")
    add(database, "Nothing but snow", name="post", collection="c")
    read_all(database)  # this node has no Chroma
    assert unindexed(database) == 2
    assert found(library, "about the parcel", mode=SearchMode.DENSE) == ["new"]
    assert sorted(found(library, "about the parcel", top_k=4, mode=SearchMode.DENSE)) == [
        "moon",
        "new",
        "post",
        "school",
    ]
    read_all(database, index=index)
    with database.transaction() as session:
        stored = collection_named(session, "local", "c")
    assert (unindexed(database), index.size(stored.index_name)) == (0, 4)


def test_passages_that_are_alike_have_one_order(library: Library, database: Database, index: Index) -> None:
    for number in range(9):
        add(database, TEXTS["moon"], name=f"moon-{number}", collection="c")
    read_all(database, index=index)
    alone = Library(database, None, TopicEmbedder())
    for mode in SearchMode:
        both = [found(one, "about the moon", top_k=9, mode=mode) for one in (library, alone)]
        assert both[0] == both[1]


def test_many_passages_that_chroma_still_has_take_no_place(library: Library, database: Database, index: Index) -> None:
    for number in range(DEPTH):
        add(database, "about the moon", name=f"more-{number}", collection="c")
    read_all(database, index=index)
    with database.transaction() as session:
        stored = collection_named(session, "local", "c")
        gone = [f"/docs/more-{number}" for number in range(DEPTH)]
        assert len(remove_documents(session, gone, tenant="local", collection_id=stored.id)) == DEPTH
    assert found(library, "about the moon", mode=SearchMode.DENSE) == ["moon"]


def test_the_passages_of_one_document_are_found_and_of_no_other_tenant(library: Library, database: Database) -> None:
    paragraphs = [f"Sentence {number} is about a {word}. " * 4 + word for number, word in enumerate(("cat", "dog"))]
    document = add(database, "\n\n".join(paragraphs), name="pets", collection="c")
    read_all(database)
    [hit] = asyncio.run(library.search_document("about the dog", document_id=document, tenant="local", top_k=1))
    assert hit.passage.text.endswith("dog")
    assert (hit.passage.document_id, hit.cosine) == (document, hit.score)
    assert asyncio.run(library.search_document("dog", document_id=document, tenant="other", top_k=1)) == []
    assert asyncio.run(library.search_document("dog", document_id=document + 1, tenant="local", top_k=1)) == []


def test_a_removed_collection_leaves_chroma(library: Library, database: Database, index: Index) -> None:
    with database.transaction() as session:
        stored = collection_named(session, "local", "c")
        assert remove_collection(session, tenant="local", collection_id=stored.id) == 3
    read_all(database, index=index)
    with pytest.raises(Exception, match=stored.index_name):
        index.size(stored.index_name)


def test_nothing_crosses_tenants_or_embedders(library: Library, database: Database) -> None:
    with pytest.raises(NotFound, match="no collection c"):
        asyncio.run(library.search(["moon"], tenant="other", collection="c", top_k=1))
    add(database, "The moon of another tenant is the moon", name="moon", collection="c", tenant="other")
    read_all(database)
    assert found(library, "about the moon", top_k=9).count("moon") == 1
    execute(database, "UPDATE collections SET embedder = 'another'")
    with pytest.raises(Permanent, match="are of the embedder another") as caught:
        found(library, "about the moon")
    assert caught.value.code == "other_embedder"
