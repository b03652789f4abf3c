"""The rows of the gateway: keys, files, token budgets with what is reserved of them, webhooks."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, SmallInteger, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT
from sqlalchemy.orm import Mapped, mapped_column

from models.rows import Base, word
from models.states import BudgetPeriod, DeliveryState, Part, Purpose


class ApiKey(Base):
    """A tenant's key: its public part, and the digest of its secret, which nobody can read back.

    After a rotation the earlier secret holds until `previous_until`.
    """

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)  # the key's public part
    tenant: Mapped[str]
    name: Mapped[str]
    digest: Mapped[bytes]  # sha256 of the secret
    previous_digest: Mapped[bytes | None]
    previous_until: Mapped[datetime | None]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    requests_per_minute: Mapped[int | None]  # null: the setting's
    day_tokens: Mapped[int | None] = mapped_column(BIGINT)  # null: without a budget
    month_tokens: Mapped[int | None] = mapped_column(BIGINT)
    day_money: Mapped[int | None] = mapped_column(BIGINT)  # nanos for priced endpoints; null: without such a budget
    month_money: Mapped[int | None] = mapped_column(BIGINT)
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # within a minute

    __table_args__ = (Index(None, "tenant"),)


class StoredFile(Base):
    """A file as the API shows it: an upload, whose bytes are a blob, or a part of a batch's results, made from rows.

    `size_bytes` of a part is null until it was counted.
    """

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    purpose: Mapped[Purpose] = mapped_column(word(Purpose, "purpose"))
    filename: Mapped[str]
    size_bytes: Mapped[int | None] = mapped_column(BIGINT)
    digest: Mapped[str | None]  # sha256
    blob: Mapped[str | None]
    batch_id: Mapped[UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    part: Mapped[Part | None] = mapped_column(word(Part, "part"))
    counting_until: Mapped[datetime | None]  # the lease of who counts its size
    estimate: Mapped[dict[str, Any] | None]  # what its lines would become
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("(blob IS NULL) = (batch_id IS NOT NULL)", name="origin"),
        Index(None, "tenant", "created_at", "id"),
        Index(None, "batch_id"),
        Index("ix_files_uncounted", "id", postgresql_where=text("size_bytes IS NULL AND deleted_at IS NULL")),
        Index("ix_files_expiring", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
        Index("ix_files_deleted", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
    )


class Budget(Base):
    """Tokens that a key may take in a period, or a batch at all: spent + reserved never exceed the cap."""

    __tablename__ = "budgets"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    batch_id: Mapped[UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    period: Mapped[BudgetPeriod] = mapped_column(word(BudgetPeriod, "period"))
    began_at: Mapped[datetime]
    cap: Mapped[int] = mapped_column(BIGINT)
    spent: Mapped[int] = mapped_column(BIGINT, server_default="0")  # tokens of committed results
    reserved: Mapped[int] = mapped_column(BIGINT, server_default="0")  # the most that claimed jobs may yet take
    waits_until: Mapped[datetime | None]  # no shard that takes from it is sent before: all that is left is reserved

    __table_args__ = (
        CheckConstraint("spent >= 0 AND reserved >= 0", name="amounts"),
        UniqueConstraint(
            "key_id", "batch_id", "period", "began_at", name="uq_budgets_owner", postgresql_nulls_not_distinct=True
        ),
        Index(None, "batch_id"),
        Index("ix_budgets_waiting", "waits_until", postgresql_where=text("waits_until IS NOT NULL")),
    )


class Reservation(Base):
    """What one attempt of a shard has reserved of one budget; gone with the attempt."""

    __tablename__ = "reservations"

    shard_id: Mapped[int] = mapped_column(BIGINT, primary_key=True, autoincrement=False)
    budget_id: Mapped[int] = mapped_column(
        BIGINT, ForeignKey("budgets.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    fence: Mapped[int] = mapped_column(BIGINT)
    amount: Mapped[int] = mapped_column(BIGINT)

    __table_args__ = (Index(None, "budget_id"),)


class WebhookSecret(Base):
    """What a tenant's webhooks are signed with; its receivers know it too.

    After a rotation they are signed with `previous` too, until `previous_until`.
    """

    __tablename__ = "webhook_secrets"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    secret: Mapped[bytes]
    previous: Mapped[bytes | None]
    previous_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))


class Delivery(Base):
    """A webhook that tells of a batch's end, written with that end, and what became of it."""

    __tablename__ = "deliveries"

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    tenant: Mapped[str]
    batch_id: Mapped[UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    url: Mapped[str]
    event: Mapped[str]  # such as batch.completed
    state: Mapped[DeliveryState] = mapped_column(word(DeliveryState, "state"), server_default="pending")
    tries: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    next_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    status_code: Mapped[int | None] = mapped_column(SmallInteger)  # of the last try
    error: Mapped[str | None]  # of the last try
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        Index("ix_deliveries_pending", "next_at", postgresql_where=text("state = 'pending'")),
        Index(None, "batch_id", unique=True),  # a batch ends once
        Index(None, "tenant", "created_at"),
    )
