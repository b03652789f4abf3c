"""The rows of jobs, results and the cache (PROTOCOL.md); those of documents are in document_rows.py.

SQL that reads or writes them is in store/.

jobs and results are partitioned by batch id (UUIDv7, so by week) and carry no foreign key: it would make
COPY 2.1 to 2.5 times slower. Bodies and responses are text holding JSON, not jsonb, which refuses \\u0000.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT, INTEGER, JSONB, REAL
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models.states import BatchState, Ending, Outcome, Priority, ShardState, Source

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Timestamps are timestamptz; dicts are jsonb."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy's own protocol
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        str: Text,
    }


def word(states: type[StrEnum], name: str) -> Enum:
    """A string column with a CHECK that holds it to an enum's values."""
    return Enum(
        states,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


class Batch(Base):
    """Many jobs of one tenant with one endpoint and one completion window."""

    __tablename__ = "batches"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default="local")
    state: Mapped[BatchState] = mapped_column(word(BatchState, "state"))
    ending: Mapped[Ending | None] = mapped_column(word(Ending, "ending"))
    endpoint: Mapped[str]
    input_name: Mapped[str]
    input_digest: Mapped[str]  # sha256 of the file
    submit_digest: Mapped[str]  # sha256 of the file's digest and the options: the same submit twice
    options: Mapped[dict[str, Any]]
    max_output_tokens: Mapped[int | None]
    priority: Mapped[Priority] = mapped_column(word(Priority, "priority"), server_default="normal")
    weight: Mapped[float] = mapped_column(server_default="1")  # its share among its tenant's batches
    retry_of: Mapped[UUID | None]  # the batch whose failed lines these are
    skipped: Mapped[int] = mapped_column(server_default="0")  # bad lines that submit was told to leave out
    total: Mapped[int] = mapped_column(server_default="0")
    followers: Mapped[int] = mapped_column(server_default="0")  # jobs that wait for an equal one's result
    shards_left: Mapped[int] = mapped_column(server_default="0")
    cursor: Mapped[int] = mapped_column(BIGINT, server_default="0")  # last shard that dispatch took
    screened: Mapped[bool] = mapped_column(server_default=text("false"))  # its first 200 jobs were looked at
    paused_reason: Mapped[str | None]
    spill: Mapped[int] = mapped_column(server_default="0")  # jobs that may yet begin on priced endpoints
    fence: Mapped[int] = mapped_column(BIGINT, server_default="0")  # of the batch's own long steps
    lease_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    expires_at: Mapped[datetime | None]
    in_progress_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]  # past retention: gone for everybody, its rows on their way out
    sums: Mapped[dict[str, Any] | None]  # of its shards' counters, once it has ended
    # Of a batch that came through the gateway; it is validated after its creation was answered.
    input_file_id: Mapped[str | None]
    key_id: Mapped[str | None]  # whose budgets it takes from
    request: Mapped[dict[str, Any] | None]  # its create body
    validations: Mapped[int] = mapped_column(SmallInteger, server_default="0")  # tries; one that was put back is none
    problems: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB)  # why validation refused its file

    __table_args__ = (
        CheckConstraint("weight > 0", name="weight"),
        Index("ix_batches_tenant", "tenant", "id"),
        Index(None, "tenant", "submit_digest"),
        Index(
            "ix_batches_live",
            "id",
            postgresql_where=text("state IN ('validating', 'in_progress', 'cancelling', 'finalizing')"),
        ),
    )


class Job(Base):
    """One line of a batch; never changed after its insert. Done = a row in results."""

    __tablename__ = "jobs"

    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(INTEGER, primary_key=True, autoincrement=False)  # from 0, the input's order
    custom_id: Mapped[str]
    body: Mapped[str]  # JSON, sent to the endpoint as it stands
    stoker: Mapped[str | None]  # JSON, the line's own `stoker` object: how it is to run, never sent

    __table_args__ = ({"postgresql_partition_by": "RANGE (batch_id)"},)


class Follower(Base):
    """A job that equals another of its batch, its leader: it is in no shard, the leader's result becomes its own."""

    __tablename__ = "followers"

    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(INTEGER, primary_key=True, autoincrement=False)
    leader: Mapped[int] = mapped_column(INTEGER)

    __table_args__ = (Index(None, "batch_id", "leader"),)


class Result(Base):
    """What a job ended with, exactly one row a job."""

    __tablename__ = "results"

    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(INTEGER, primary_key=True, autoincrement=False)
    outcome: Mapped[Outcome] = mapped_column(word(Outcome, "outcome"))
    source: Mapped[Source] = mapped_column(word(Source, "source"))
    status_code: Mapped[int | None] = mapped_column(SmallInteger)
    response: Mapped[str | None]  # JSON as the endpoint sent it
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    reasoning_tokens: Mapped[int]
    duration_ms: Mapped[int]
    engine_id: Mapped[int | None]
    cache_entry_id: Mapped[int | None] = mapped_column(BIGINT)
    namespace_id: Mapped[int | None] = mapped_column(BIGINT)  # of a semantic one
    similarity: Mapped[float | None] = mapped_column(REAL)
    stoker: Mapped[str | None]  # JSON, members of the result line's `stoker`: passages, conversation, document
    cost: Mapped[int | None] = mapped_column(BIGINT)  # nanos, where its endpoint bills tokens; else null
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))

    __table_args__ = ({"postgresql_partition_by": "RANGE (batch_id)"},)


class Shard(Base):
    """Jobs of one batch that go to a worker together; its fence guards every write of an attempt."""

    __tablename__ = "shards"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    batch_id: Mapped[UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    seqs: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")  # estimated, prompts and most output: its cost
    quarantined: Mapped[bool] = mapped_column(server_default=text("false"))  # runs with nothing else on its engine
    engine: Mapped[str | None]  # where the running attempt sends its jobs
    worker: Mapped[str | None]  # whose child runs it: what dies together
    state: Mapped[ShardState] = mapped_column(word(ShardState, "state"), server_default="pending")
    fence: Mapped[int] = mapped_column(BIGINT, server_default="0")
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    holder: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    dispatched_at: Mapped[datetime | None]
    done_at_claim: Mapped[int] = mapped_column(server_default="0")
    # Counters of committed results. They stand here, not on the batch's one row, where every write would queue.
    done: Mapped[int] = mapped_column(server_default="0")
    failed: Mapped[int] = mapped_column(server_default="0")
    truncated: Mapped[int] = mapped_column(server_default="0")
    empty: Mapped[int] = mapped_column(server_default="0")
    prompt_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")
    reasoning_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")
    served: Mapped[int] = mapped_column(server_default="0")  # from the cache
    exact: Mapped[int] = mapped_column(server_default="0")  # of these, by the answer to an equal request
    semantic: Mapped[int] = mapped_column(server_default="0")  # by that to one that means the same; the rest followed
    saved_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")  # what they took when the engine answered
    followers: Mapped[int] = mapped_column(server_default="0")  # results of followers, written with their leaders'
    unlooked: Mapped[int] = mapped_column(server_default="0")  # lookups that a cache could not answer, being down

    __table_args__ = (
        CheckConstraint("done <= cardinality(seqs)", name="done"),
        # No index on lease_until: it would end HOT updates by the heartbeat.
        Index("ix_shards_pending", "batch_id", "id", postgresql_where=text("state = 'pending'")),
        Index(
            "ix_shards_returned",
            "batch_id",
            "not_before",
            postgresql_where=text("state = 'pending' AND not_before IS NOT NULL"),
        ),
        Index("ix_shards_live", "id", postgresql_where=text("state IN ('dispatched', 'running')")),
        Index("ix_shards_alone", "id", postgresql_where=text("state = 'running' AND (quarantined OR crashes >= 2)")),
        Index(None, "batch_id"),
        {"postgresql_with": {"fillfactor": "70"}},
    )


class JobTry(Base):
    """How often a job has failed transiently, how many engines died under it, and when it may be tried again."""

    __tablename__ = "job_tries"

    batch_id: Mapped[UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(INTEGER, primary_key=True, autoincrement=False)
    tries: Mapped[int] = mapped_column(SmallInteger)
    engine_deaths: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    not_before: Mapped[datetime]
    last_error: Mapped[str]


class JobStep(Base):
    """A reply that a job of several requests has had (pipeline/steps.py); gone with the job's result.

    Redis has it sooner; this one is written with results, so that a Redis which is emptied loses half a second.
    """

    __tablename__ = "job_steps"

    batch_id: Mapped[UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(INTEGER, primary_key=True, autoincrement=False)
    step: Mapped[str] = mapped_column(primary_key=True)
    reply: Mapped[str]  # JSON
    charged: Mapped[int] = mapped_column(server_default="0")  # tokens of it that budgets have counted as spent


class CacheEntry(Base):
    """An engine's answer, found again by the digest of all that could change it (cache/keys.py).

    One with a namespace may answer for other payloads too; `answer` is what answers are compared by, `vector` the
    payload's, float32.
    """

    __tablename__ = "cache_entries"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    tenant: Mapped[str]
    key: Mapped[bytes]
    response: Mapped[str]
    status_code: Mapped[int] = mapped_column(SmallInteger)
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    batch_id: Mapped[UUID]  # the job that it was given to
    seq: Mapped[int] = mapped_column(INTEGER)
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    expires_at: Mapped[datetime] = mapped_column(index=True)
    namespace_id: Mapped[int | None] = mapped_column(BIGINT)
    payload: Mapped[str | None]
    answer: Mapped[str | None]
    vector: Mapped[bytes | None]

    __table_args__ = (
        UniqueConstraint("tenant", "key", name="uq_cache_entries_tenant_key"),
        Index("ix_cache_entries_namespace", "namespace_id", "id", postgresql_where=text("namespace_id IS NOT NULL")),
    )


class CacheSource(Base):
    """A source, such as a document, that an entry's prompt was made from: when it changes the entry is wrong."""

    __tablename__ = "cache_sources"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(primary_key=True)
    entry_id: Mapped[int] = mapped_column(
        BIGINT, ForeignKey("cache_entries.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )

    __table_args__ = (Index(None, "entry_id"),)


class CacheEpoch(Base):
    """Part of the keys within a scope: raising it makes every answer of before old.

    Scopes: `tenant`, `checkpoint:…`, `template:…`, `collection:…`.
    """

    __tablename__ = "cache_epochs"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    scope: Mapped[str] = mapped_column(primary_key=True)
    epoch: Mapped[int]


class CacheNamespace(Base):
    """Payloads that may answer for each other: one template, checkpoint and sampling of one tenant.

    `policy` is the state of its certificate (cache/policy.py), `model` what was fitted; a new fit has a new number.
    """

    __tablename__ = "cache_namespaces"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    tenant: Mapped[str]
    key: Mapped[bytes]
    endpoint: Mapped[str]
    alias: Mapped[str]  # what jobs call the checkpoint
    checkpoint: Mapped[str]
    embedder: Mapped[str]
    template: Mapped[str]  # to be read; `scope` tells templates apart
    scope: Mapped[str]
    ttl_s: Mapped[float | None]  # of its entries; null: the setting's
    secret: Mapped[bytes]  # of the audit coins
    policy: Mapped[str]
    model: Mapped[bytes | None]
    fit: Mapped[int] = mapped_column(server_default="0")
    fitting_until: Mapped[datetime | None]
    asked_twice: Mapped[int] = mapped_column(server_default="0")
    differed: Mapped[int] = mapped_column(server_default="0")  # of those: the engine gave two answers
    # Of all versions of the policy together.
    lookups: Mapped[int] = mapped_column(BIGINT, server_default="0")
    served: Mapped[int] = mapped_column(BIGINT, server_default="0")
    audits: Mapped[int] = mapped_column(BIGINT, server_default="0")
    saved_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")
    audit_tokens: Mapped[int] = mapped_column(BIGINT, server_default="0")  # spent on what would have been served
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    used_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))  # of its last lookup

    __table_args__ = (UniqueConstraint("tenant", "key", name="uq_cache_namespaces_tenant_key"),)


class CacheLookup(Base):
    """A lookup that was not served: what would have been, and whether the engine agreed.

    A job is looked up once, also when its worker dies: its second attempt finds this row. `coin` was drawn before the
    lookup was scored; `audited`: it would have been served but for the coin. `folded`: the policy has heard of it.
    """

    __tablename__ = "cache_lookups"

    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(INTEGER, primary_key=True, autoincrement=False)
    namespace_id: Mapped[int] = mapped_column(BIGINT, ForeignKey("cache_namespaces.id", ondelete="CASCADE"))
    version: Mapped[int]
    place: Mapped[int]  # lookups of the version before its shard's: those before the first audit not folded are settled
    decided: Mapped[int] = mapped_column(server_default="0")  # decisions to serve before its shard's, likewise
    served_beside: Mapped[int]  # answers that its shard was served
    coin: Mapped[float]
    rate: Mapped[float]
    wished: Mapped[bool]
    in_shadow: Mapped[bool]
    audited: Mapped[bool]
    answer: Mapped[str | None]  # the neighbours'
    features: Mapped[bytes | None]  # float32
    agreed: Mapped[bool | None]  # null though judged: an audit whose batch ended without its answer
    repeated: Mapped[bool | None]  # asked twice: whether the engine gave the same answer
    tokens: Mapped[int] = mapped_column(server_default="0")  # that the engine took
    judged_at: Mapped[datetime | None]
    folded: Mapped[bool] = mapped_column(server_default=text("false"))

    __table_args__ = (
        Index("ix_cache_lookups_news", "namespace_id", postgresql_where=text("judged_at IS NOT NULL AND NOT folded")),
        Index(None, "namespace_id", "judged_at"),
        Index("ix_cache_lookups_out", "namespace_id", postgresql_where=text("audited AND NOT folded")),
    )


class Engine(Base):
    """An engine that gave results: its kind, version, flags and checkpoint digest, for the manifest."""

    __tablename__ = "engines"

    id: Mapped[int] = mapped_column(INTEGER, Identity(), primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    description: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
