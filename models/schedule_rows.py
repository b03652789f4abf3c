"""The rows of schedules and of their runs (docs/operations.md).

SQL that reads or writes them is in store/schedules.py.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, SmallInteger, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT
from sqlalchemy.orm import Mapped, mapped_column

from models.rows import Base, word
from models.states import Missed, Overlap, RunState


class Schedule(Base):
    """A command of `stoker` that is run at the times of a cron expression, in a time zone.

    Every due time up to `due_until` has a run or was let go: who looks next goes on from there.
    """

    __tablename__ = "schedules"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    cron: Mapped[str]
    timezone: Mapped[str]  # of the IANA database
    command: Mapped[list[str]] = mapped_column(ARRAY(Text))  # as it stands after `stoker`
    folder: Mapped[str]  # where it is run: its relative paths are meant there
    missed: Mapped[Missed] = mapped_column(word(Missed, "missed"))
    overlap: Mapped[Overlap] = mapped_column(word(Overlap, "overlap"))
    due_until: Mapped[datetime]
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))

    __table_args__ = (UniqueConstraint("tenant", "name", name="uq_schedules_tenant_name"),)


class ScheduleRun(Base):
    """One run: of a due time, or one that was asked for. Its fence guards every write of who runs it."""

    __tablename__ = "schedule_runs"

    id: Mapped[int] = mapped_column(BIGINT, Identity(), primary_key=True)
    schedule_id: Mapped[int] = mapped_column(BIGINT, ForeignKey("schedules.id", ondelete="CASCADE"))
    due_at: Mapped[datetime]
    asked_for: Mapped[bool] = mapped_column(server_default=text("false"))  # by `stoker schedule run`
    state: Mapped[RunState] = mapped_column(word(RunState, "state"), server_default="waiting")
    fence: Mapped[int] = mapped_column(BIGINT, server_default="0")
    tries: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    lease_until: Mapped[datetime | None]
    sent_at: Mapped[datetime | None]  # its last hint
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    exit_code: Mapped[int | None] = mapped_column(SmallInteger)
    batch_id: Mapped[UUID | None]  # of a submit
    told: Mapped[str | None]  # the end of what the command said, or why it was skipped

    __table_args__ = (
        UniqueConstraint("schedule_id", "due_at", name="uq_schedule_runs_schedule_id_due_at"),
        Index("ix_schedule_runs_open", "id", postgresql_where=text("state IN ('waiting', 'running')")),
    )
