"""Reads what work took and what engines cost, for reports: the `usage` and `engine_days` rows, and names for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class Taken:
    """What one batch took of one engine or endpoint on one day; `cost` is what a priced endpoint asked, in nanos."""

    tenant: str
    key_id: str
    batch_id: UUID
    engine_id: int
    day: date
    jobs: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost: int


@dataclass(frozen=True, slots=True)
class HeldDay:
    """How an own engine was held on one day: seconds as in EngineDay, `cost` in nanos."""

    engine_id: int
    day: date
    up_s: float
    busy_s: float
    slot_s: float
    slots_s: float
    gpu_s: float
    gpu_read_s: float
    cost: int


@dataclass(frozen=True, slots=True)
class KnownEngine:
    """A row of engines: its description, and since when there is one."""

    id: int
    description: dict[str, Any]
    since: datetime


_TAKEN = """
SELECT tenant, key_id, batch_id, engine_id, day, CAST(sum(jobs) AS int8), CAST(sum(prompt_tokens) AS int8),
    CAST(sum(completion_tokens) AS int8), CAST(sum(cached_tokens) AS int8), CAST(sum(cost) AS int8)
FROM usage WHERE {condition}
GROUP BY tenant, key_id, batch_id, engine_id, day ORDER BY day, batch_id, engine_id, tenant, key_id
"""


def taken_since(session: Session, day: date) -> list[Taken]:
    """What all batches and single requests of all tenants took from this day of UTC on."""
    return [Taken(*row) for row in session.execute(text(_TAKEN.format(condition="day >= :day")), {"day": day})]


def taken_by(session: Session, batch_id: UUID) -> list[Taken]:
    """What one batch took, whenever."""
    return [Taken(*row) for row in session.execute(text(_TAKEN.format(condition="batch_id = :id")), {"id": batch_id})]


def taken_beside(session: Session, pairs: Collection[tuple[int, date]]) -> list[Taken]:
    """What all batches took of these engines on these days: with whom one shares what they cost."""
    ordered = sorted(pairs)
    condition = "(engine_id, day) IN (SELECT * FROM unnest(CAST(:engines AS int4[]), CAST(:days AS date[])))"
    values = {"engines": [engine for engine, _ in ordered], "days": [day for _, day in ordered]}
    return [Taken(*row) for row in session.execute(text(_TAKEN.format(condition=condition)), values)]


def held_since(session: Session, day: date) -> list[HeldDay]:
    """How own engines were held from this day of UTC on, by day."""
    rows = session.execute(
        text("""
        SELECT engine_id, day, up_s, busy_s, slot_s, slots_s, gpu_s, gpu_read_s, cost FROM engine_days
        WHERE day >= :day ORDER BY day, engine_id"""),
        {"day": day},
    )
    return [HeldDay(*row) for row in rows]


def engines_by_id(session: Session, ids: Collection[int]) -> dict[int, KnownEngine]:
    """The engines' rows."""
    rows = session.execute(
        text("SELECT id, description, created_at FROM engines WHERE id = ANY(CAST(:ids AS int4[]))"),
        {"ids": sorted(ids)},
    )
    return {identifier: KnownEngine(identifier, described, since) for identifier, described, since in rows}


def key_names(session: Session, ids: Sequence[str]) -> dict[str, str]:
    """The names of keys by their public ids; a key that is gone has none."""
    rows = session.execute(
        text("SELECT id, name FROM api_keys WHERE id = ANY(CAST(:ids AS text[]))"), {"ids": list(ids)}
    )
    return {identifier: name for identifier, name in rows}


def input_names(session: Session, ids: Collection[UUID]) -> dict[UUID, str]:
    """What batches were made of; a batch that is gone has none."""
    rows = session.execute(
        text("SELECT id, input_name FROM batches WHERE id = ANY(CAST(:ids AS uuid[]))"), {"ids": sorted(ids)}
    )
    return {identifier: name for identifier, name in rows}
