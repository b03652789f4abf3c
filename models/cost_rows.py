"""The rows of endpoints and of what work costs: money is in nanos, billionths of the currency's unit.

SQL that reads or writes them is in store/.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Date, ForeignKey, Identity, Index, SmallInteger, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import BIGINT, DOUBLE_PRECISION
from sqlalchemy.orm import Mapped, mapped_column

from models.rows import Base, word
from models.states import BudgetPeriod


class Endpoint(Base):
    """An endpoint that was added; `spec` is an EndpointSpec, which has no secret."""

    __tablename__ = "endpoints"

    name: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))


class Usage(Base):
    """What a batch took of an engine or endpoint on one day of UTC; kept when the batch is gone.

    A batch's writes are spread over some slots, so that its workers do not wait for each other. Single requests have
    the batch 0. `key_id` is '' without a key.
    """

    __tablename__ = "usage"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    engine_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    slot: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    jobs: Mapped[int] = mapped_column(BIGINT)
    prompt_tokens: Mapped[int] = mapped_column(BIGINT)
    completion_tokens: Mapped[int] = mapped_column(BIGINT)
    cached_tokens: Mapped[int] = mapped_column(BIGINT)
    cost: Mapped[int] = mapped_column(BIGINT)  # what priced endpoints asked

    __table_args__ = (
        Index(None, "batch_id"),
        Index(None, "engine_id", "day"),
        {"postgresql_with": {"fillfactor": "70"}},
    )


class EngineDay(Base):
    """How long an own engine was held on one day of UTC, how much of that it worked, and what it cost.

    Loading and restarts are part of it: its machine costs then too.
    """

    __tablename__ = "engine_days"

    engine_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    up_s: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default="0")
    busy_s: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default="0")  # with a request at least
    slot_s: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default="0")  # sequences that ran, times seconds
    slots_s: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default="0")  # those that could have, times seconds
    gpu_s: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default="0")  # the GPUs' use, times seconds
    gpu_read_s: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default="0")  # with a reading of the GPUs
    cost: Mapped[int] = mapped_column(BIGINT, server_default="0")  # up_s at the price of an hour
    counted_until: Mapped[datetime | None]  # of one that several workers share, so that its hours count once


class MoneyBudget(Base):
    """Money that a key may spend in a period, or a batch at all: spent + reserved never exceed the cap."""

    __tablename__ = "money_budgets"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    batch_id: Mapped[UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    period: Mapped[BudgetPeriod] = mapped_column(word(BudgetPeriod, "period"))
    began_at: Mapped[datetime]
    cap: Mapped[int] = mapped_column(BIGINT)
    spent: Mapped[int] = mapped_column(BIGINT, server_default="0")  # of committed results, and of what may have run
    reserved: Mapped[int] = mapped_column(BIGINT, server_default="0")  # the most that requests under way may cost

    __table_args__ = (
        CheckConstraint("spent >= 0 AND reserved >= 0", name="amounts"),
        UniqueConstraint(
            "key_id",
            "batch_id",
            "period",
            "began_at",
            name="uq_money_budgets_owner",
            postgresql_nulls_not_distinct=True,
        ),
        Index(None, "batch_id"),
    )


class MoneyReservation(Base):
    """What one attempt of a shard has reserved of one budget, for so many requests, and what it has spent so far.

    Gone with the attempt; if that died, what it had reserved is spent.
    """

    __tablename__ = "money_reservations"

    shard_id: Mapped[int] = mapped_column(BIGINT, primary_key=True, autoincrement=False)
    budget_id: Mapped[int] = mapped_column(
        BIGINT, ForeignKey("money_budgets.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    fence: Mapped[int] = mapped_column(BIGINT)
    amount: Mapped[int] = mapped_column(BIGINT)
    spent: Mapped[int] = mapped_column(BIGINT)
    requests: Mapped[int]

    __table_args__ = (Index(None, "budget_id"),)
