"""The rows of documents: collections, documents, their passages, and what is still to reach Chroma."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Computed, ForeignKey, Identity, Index, SmallInteger, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import BIGINT, REAL, TSVECTOR
from sqlalchemy.orm import Mapped, mapped_column

from models.rows import Base, word
from models.states import DocumentState


class Collection(Base):
    """A named set of passages of one tenant, whose vectors one embedder made."""

    __tablename__ = "collections"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    embedder: Mapped[str | None]  # of its first passages; others would not be comparable
    index_name: Mapped[str]  # in Chroma: no other installation has the same
    lost: Mapped[bool] = mapped_column(server_default=text("false"))  # Chroma was found without it
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))

    __table_args__ = (UniqueConstraint("tenant", "name", name="uq_collections_tenant_name"),)


class Document(Base):
    """A file or page as it was added: the newest bytes given, and the text that was made of them.

    `digest` is that of the newest bytes; what was made of earlier ones stays until these are ready. Without a
    collection it is read and not cut: recipes that need its text only. `fence` guards every write of an attempt.
    """

    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    tenant: Mapped[str]
    collection_id: Mapped[int | None] = mapped_column(BIGINT, ForeignKey("collections.id", ondelete="CASCADE"))
    source: Mapped[str]  # its path or URL
    digest: Mapped[str | None]  # sha256; null before a URL was fetched
    size_bytes: Mapped[int | None] = mapped_column(BIGINT)
    kind: Mapped[str | None]
    note: Mapped[str | None]  # what is odd about it and harmless
    state: Mapped[DocumentState] = mapped_column(word(DocumentState, "state"), server_default="pending")
    fence: Mapped[int] = mapped_column(BIGINT, server_default="0")
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default="0")  # attempts in a row that died
    tries: Mapped[int] = mapped_column(SmallInteger, server_default="0")  # that failed and may be repeated
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    markdown: Mapped[str | None]
    text_digest: Mapped[str | None]  # `digest` of the bytes that `markdown` was made from
    passages: Mapped[int] = mapped_column(server_default="0")
    seconds: Mapped[float | None] = mapped_column(REAL)  # that its reading, cutting and embedding took
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    ended_at: Mapped[datetime | None]  # ready or failed since

    __table_args__ = (
        UniqueConstraint(
            "tenant", "collection_id", "source", name="uq_documents_source", postgresql_nulls_not_distinct=True
        ),
        Index("ix_documents_running", "id", postgresql_where=text("state = 'running'")),
        Index("ix_documents_open", "id", postgresql_where=text("state IN ('pending', 'running')")),
        Index(None, "collection_id"),
    )


class DocumentBytes(Base):
    """The bytes of a document that is still to be read."""

    __tablename__ = "document_bytes"

    document_id: Mapped[int] = mapped_column(
        BIGINT, ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    content: Mapped[bytes]


class PassageRow(Base):
    """A part of a document, as it is found and put into prompts: its Markdown from `start_char` to `end_char`."""

    __tablename__ = "passages"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    document_id: Mapped[int] = mapped_column(BIGINT, ForeignKey("documents.id", ondelete="CASCADE"))
    collection_id: Mapped[int] = mapped_column(BIGINT)
    place: Mapped[int]
    start_char: Mapped[int]
    end_char: Mapped[int]
    page: Mapped[int | None]
    heading: Mapped[str | None]
    tokens: Mapped[int]  # the embedder's
    digest: Mapped[bytes]
    content: Mapped[str]
    vector: Mapped[bytes]  # float32
    indexed: Mapped[bool] = mapped_column(server_default=text("false"))  # Chroma has it
    words: Mapped[str] = mapped_column(
        TSVECTOR,
        Computed(
            "setweight(to_tsvector('english', coalesce(heading, '')), 'A') || to_tsvector('english', content)",
            persisted=True,
        ),
    )

    __table_args__ = (
        Index(None, "document_id"),
        Index("ix_passages_unindexed", "collection_id", "id", postgresql_where=text("NOT indexed")),
        Index("ix_passages_collection", "collection_id", "id"),
        Index("ix_passages_words", "words", postgresql_using="gin"),
    )


class VectorRemoval(Base):
    """A vector that is to leave Chroma: it was written with the deletion, so none is forgotten."""

    __tablename__ = "vector_removals"

    index_name: Mapped[str] = mapped_column(primary_key=True)  # the collection's name in Chroma
    passage_id: Mapped[int] = mapped_column(BIGINT, primary_key=True, autoincrement=False)  # 0: the collection is gone
