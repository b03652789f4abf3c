"""What travels through the broker: ids only, JSON only. Wire names are permanent."""

from __future__ import annotations

from typing import ClassVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from models.names import short_name


class Hint(BaseModel):
    """A message that asks for one task; losing or repeating it harms nothing."""

    # A field that a newer version adds has a default there, and is none to us.
    model_config = ConfigDict(frozen=True, extra="ignore")

    wire_name: ClassVar[str]
    queue: ClassVar[str]

    @property
    def shown(self) -> str:
        """What it is about, for people who look at Flower."""
        return ""


class RunShard(Hint):
    """A hint that a shard waits to be claimed; losing or repeating it harms nothing."""

    wire_name: ClassVar[str] = "stoker.run_shard"
    queue: ClassVar[str] = "generation"

    shard_id: int
    batch_id: str

    @property
    def shown(self) -> str:
        """The shard and its batch."""
        return f"shard {self.shard_id} of {short_name(UUID(self.batch_id))}"


class Ingest(Hint):
    """A hint that documents wait to be read; losing or repeating it harms nothing."""

    wire_name: ClassVar[str] = "stoker.ingest"
    queue: ClassVar[str] = "documents"


class AnswerSingle(Hint):
    """A hint that single requests wait to be answered; losing or repeating it harms nothing."""

    wire_name: ClassVar[str] = "stoker.answer_single"
    queue: ClassVar[str] = "express"


class LookAtSchedules(Hint):
    """A hint that runs of schedules may be due; losing or repeating it harms nothing."""

    wire_name: ClassVar[str] = "stoker.look_at_schedules"
    queue: ClassVar[str] = "control"


class RunSchedule(Hint):
    """A hint that a run of a schedule waits; losing or repeating it harms nothing."""

    wire_name: ClassVar[str] = "stoker.run_schedule"
    queue: ClassVar[str] = "control"

    run_id: int
    schedule: str
    due_at: str  # in the schedule's zone
    sent_at: str  # by Postgres's clock

    @property
    def shown(self) -> str:
        """The schedule and its due time."""
        return f"{self.schedule}, due {self.due_at}"
