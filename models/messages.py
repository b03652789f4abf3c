"""What travels through the broker: ids only, JSON only. Wire names are permanent."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class RunShard(BaseModel):
    """A hint that a shard waits to be claimed; losing or repeating it harms nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wire_name: ClassVar[str] = "stoker.run_shard"
    queue: ClassVar[str] = "generation"

    shard_id: int
    batch_id: str


class Ingest(BaseModel):
    """A hint that documents wait to be read; losing or repeating it harms nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wire_name: ClassVar[str] = "stoker.ingest"
    queue: ClassVar[str] = "documents"


class AnswerSingle(BaseModel):
    """A hint that single requests wait to be answered; losing or repeating it harms nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wire_name: ClassVar[str] = "stoker.answer_single"
    queue: ClassVar[str] = "express"
