"""SQL of passages: written with their document, found by words or by vector, told to Chroma and taken from it.

Postgres is the truth: vectors stand here too, and whatever Chroma names is looked up here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.arrays import Int4s, Int8s, Texts
from store.documents import DocumentClaim

MOST_LEXEMES = 32  # of a query: each is counted in the collection
SHORT_CHARACTERS = 600  # a passage that is shown as a whole
RAREST = 10  # of these are ranked by
_WEIGHTS = "{1, 0, 0, 0}"  # of the text alone, not of headings: see benchmarks.retrieval
# The question's words, any of which may be there: all of them seldom are.
_QUERY = "CAST(replace(CAST(plainto_tsquery('english', :query) AS text), '&', '|') AS tsquery)"
_MARKS = "StartSel=\x02, StopSel=\x03"


class CutPassage(Protocol):
    """A passage as documents/passages.py cuts it."""

    @property
    def place(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def page(self) -> int | None: ...
    @property
    def heading(self) -> str | None: ...
    @property
    def text(self) -> str: ...
    @property
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FoundPassage:
    """A passage and where it stands: characters `start` to `end` of its document's Markdown."""

    id: int
    document_id: int
    source: str
    page: int | None
    heading: str | None
    start: int
    end: int
    tokens: int
    digest: bytes
    text: str


@dataclass(frozen=True, slots=True)
class Unsynced:
    """A collection of which Chroma lacks passages, or has some that are gone; `lost`: it was found without it."""

    collection_id: int | None
    index_name: str
    lost: bool


def replace_passages(
    session: Session, claim: DocumentClaim, passages: Sequence[CutPassage], vectors: Sequence[bytes], *, embedder: str
) -> bool:
    """Put these in the place of a held document's passages; false if the collection has another embedder's vectors."""
    session.execute(
        text("UPDATE collections SET embedder = :embedder WHERE id = :id AND embedder IS NULL"),
        {"id": claim.collection_id, "embedder": embedder},
    )
    mine = session.scalar(
        text("SELECT embedder = :embedder FROM collections WHERE id = :id"),
        {"id": claim.collection_id, "embedder": embedder},
    )
    if not mine:
        return False
    session.execute(
        text("""
        WITH gone AS (DELETE FROM passages WHERE document_id = :id RETURNING id)
        INSERT INTO vector_removals (passage_id, index_name) SELECT id, :index FROM gone ON CONFLICT DO NOTHING"""),
        {"id": claim.id, "index": claim.index_name},
    )
    session.execute(
        text("""
        INSERT INTO passages (document_id, collection_id, place, start_char, end_char, page, heading, tokens, digest,
            content, vector)
        SELECT :id, :collection, u.* FROM unnest(CAST(:places AS int4[]), CAST(:starts AS int4[]),
            CAST(:ends AS int4[]), CAST(:pages AS int4[]), CAST(:headings AS text[]), CAST(:tokens AS int4[]),
            CAST(:digests AS bytea[]), CAST(:texts AS text[]), CAST(:vectors AS bytea[])) AS u"""),
        {
            "id": claim.id,
            "collection": claim.collection_id,
            "places": Int4s(passage.place for passage in passages),
            "starts": Int4s(passage.start for passage in passages),
            "ends": Int4s(passage.end for passage in passages),
            "pages": Int4s(passage.page for passage in passages),
            "headings": Texts(passage.heading for passage in passages),
            "tokens": Int4s(passage.tokens for passage in passages),
            "digests": [passage.digest for passage in passages],
            "texts": Texts(passage.text for passage in passages),
            "vectors": list(vectors),
        },
    )
    return True


def rank_by_words(session: Session, collection_id: int, query: str, *, limit: int) -> list[tuple[int, float]]:
    """(id, rank) of the passages that have words of the query, best first.

    A word counts by how rare it is in the collection, which Postgres's own ranks do not know: benchmarks.retrieval.
    """
    rows = session.execute(
        text(f"""
        WITH lexemes AS (
            SELECT CAST(quote_literal(word) AS tsquery) AS q
            FROM unnest(tsvector_to_array(to_tsvector('english', :query))) AS word LIMIT {MOST_LEXEMES}
        ), counted AS (
            SELECT q, (SELECT count(*) FROM passages WHERE collection_id = :collection AND words @@ q) AS n FROM lexemes
        ), whole AS (SELECT CAST(count(*) AS float8) AS n FROM passages WHERE collection_id = :collection
        ), asked AS MATERIALIZED (SELECT c.q, ln(w.n / c.n) AS rarity FROM counted c, whole w WHERE c.n > 0
            ORDER BY c.n LIMIT {RAREST})
        SELECT p.id, sum(a.rarity * ts_rank('{_WEIGHTS}', p.words, a.q)) AS rank
        FROM passages p JOIN asked a ON p.words @@ a.q WHERE p.collection_id = :collection
        GROUP BY p.id ORDER BY rank DESC, p.id LIMIT :limit"""),
        {"collection": collection_id, "query": query, "limit": limit},
    )
    return [(identifier, rank) for identifier, rank in rows]


def vectors_page(
    session: Session, collection_id: int, *, after_id: int, limit: int, unindexed: bool
) -> tuple[list[int], bytes]:
    """The ids and vectors, one after the other, of the next passages after an id: all, or those Chroma lacks."""
    rows = session.execute(
        text(f"""
        SELECT id, vector FROM passages WHERE collection_id = :collection AND id > :after
            {"AND NOT indexed" if unindexed else ""} ORDER BY id LIMIT :limit"""),
        {"collection": collection_id, "after": after_id, "limit": limit},
    ).all()
    return [identifier for identifier, _ in rows], b"".join(vector for _, vector in rows)


def vectors_of_document(session: Session, document_id: int) -> tuple[str | None, list[int], bytes]:
    """The embedder, and the ids and vectors of a document's passages, in their order."""
    rows = session.execute(
        text("""
        SELECT c.embedder, p.id, p.vector FROM passages p JOIN collections c ON c.id = p.collection_id
        WHERE p.document_id = :id ORDER BY p.place"""),
        {"id": document_id},
    ).all()
    embedder = rows[0].embedder if rows else None
    return embedder, [identifier for _, identifier, _ in rows], b"".join(vector for _, _, vector in rows)


def find_passages(session: Session, ids: Sequence[int], *, tenant: str) -> dict[int, FoundPassage]:
    """These passages by id, as far as the tenant has them."""
    rows = session.execute(
        text("""
        SELECT p.id, p.document_id, d.source, p.page, p.heading, p.start_char, p.end_char, p.tokens, p.digest, p.content
        FROM unnest(CAST(:ids AS int8[])) AS u (id)
        CROSS JOIN LATERAL (SELECT * FROM passages WHERE id = u.id OFFSET 0) AS p
        CROSS JOIN LATERAL (SELECT * FROM documents WHERE id = p.document_id OFFSET 0) AS d
        WHERE d.tenant = :tenant"""),
        {"ids": Int8s(ids), "tenant": tenant},
    )
    return {row[0]: FoundPassage(*row) for row in rows}


def highlights(session: Session, ids: Sequence[int], query: str) -> dict[int, str]:
    """The parts of these passages that say most of the query; \\x02 and \\x03 enclose its words."""
    rows = session.execute(
        text(f"""
        SELECT p.id, ts_headline('english', p.content, {_QUERY},
            CASE WHEN length(p.content) <= {SHORT_CHARACTERS} THEN :whole ELSE :parts END) FROM passages p
        WHERE p.id = ANY(CAST(:ids AS int8[]))"""),
        {
            "ids": Int8s(ids),
            "query": query,
            "whole": f"{_MARKS}, HighlightAll=true",
            "parts": f'{_MARKS}, MaxFragments=2, MaxWords=40, MinWords=15, FragmentDelimiter=" … "',
        },
    )
    return {identifier: headline for identifier, headline in rows}


def unsynced_collections(session: Session) -> list[Unsynced]:
    """The collections of which Chroma lacks passages, or has some that are gone."""
    rows = session.execute(
        text("""
        SELECT c.id, n.index_name, coalesce(c.lost, false) FROM (
            SELECT index_name FROM vector_removals UNION
            SELECT c.index_name FROM collections c
            WHERE c.lost OR EXISTS (SELECT FROM passages p WHERE p.collection_id = c.id AND NOT p.indexed)) AS n
        LEFT JOIN collections c ON c.index_name = n.index_name ORDER BY c.id""")
    )
    return [Unsynced(*row) for row in rows]


def mark_indexed(session: Session, ids: Sequence[int]) -> set[int]:
    """Chroma has these: those that are still passages."""
    return set(
        session.scalars(
            text("UPDATE passages SET indexed = true WHERE id = ANY(CAST(:ids AS int8[])) RETURNING id"),
            {"ids": Int8s(ids)},
        )
    )


def living_passages(session: Session, ids: Sequence[int]) -> set[int]:
    """Those of these ids that are passages."""
    return set(
        session.scalars(
            text("""
        SELECT p.id FROM unnest(CAST(:ids AS int8[])) AS u (id)
        CROSS JOIN LATERAL (SELECT id FROM passages WHERE id = u.id OFFSET 0) AS p"""),
            {"ids": Int8s(ids)},
        )
    )


def mark_lost(session: Session, collection_id: int) -> None:
    """Chroma was found without this collection; the documents node will see to it."""
    session.execute(text("UPDATE collections SET lost = true WHERE id = :id AND NOT lost"), {"id": collection_id})


def mark_unindexed(session: Session, collection_id: int) -> bool:
    """Chroma has nothing of this collection: all of it is to be told again. False if the collection is gone too."""
    found = session.scalar(
        text("UPDATE collections SET lost = false WHERE id = :id RETURNING true"), {"id": collection_id}
    )
    session.execute(
        text("UPDATE passages SET indexed = false WHERE collection_id = :id AND indexed"), {"id": collection_id}
    )
    return found is not None


def removals_of(session: Session, index_name: str, *, limit: int) -> list[int]:
    """Ids of passages that are gone and that Chroma may still have."""
    return list(
        session.scalars(
            text("SELECT passage_id FROM vector_removals WHERE index_name = :name ORDER BY passage_id LIMIT :limit"),
            {"name": index_name, "limit": limit},
        )
    )


def forget_removals(session: Session, index_name: str, ids: Sequence[int] | None) -> None:
    """Chroma has these no more; None: nothing of that collection."""
    session.execute(
        text("""
        DELETE FROM vector_removals WHERE index_name = :name
            AND (CAST(:ids AS int8[]) IS NULL OR passage_id = ANY(CAST(:ids AS int8[])))"""),
        {"name": index_name, "ids": None if ids is None else list(ids)},
    )
