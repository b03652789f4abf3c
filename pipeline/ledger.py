"""Reads what a report of costs is made of: what was taken, how own engines were held, and what all that is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Final
from uuid import UUID

from models.endpoints import NANOS
from runtime.clock import utc_now
from store.costs import (
    HeldDay,
    KnownEngine,
    Taken,
    engines_by_id,
    held_since,
    input_names,
    key_names,
    taken_beside,
    taken_by,
    taken_since,
)
from store.database import Session
from store.usage import SINGLE

_HOUR_S: Final = 3_600


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a report is made of. `taken` is told of; `beside` is all that the same engines did on the same days.

    `held` are the days of own engines, those without a job too where the report is of everything.
    """

    taken: Sequence[Taken]
    beside: Sequence[Taken]
    held: Sequence[HeldDay]
    engines: Mapping[int, KnownEngine]
    key_names: Mapping[str, str]
    input_names: Mapping[UUID, str]


def ledger_since(session: Session, day: date, *, tenant: str | None) -> Ledger:
    """Of everything from this day of UTC on, or of what one tenant took, without the days on which it took nothing."""
    beside, held = taken_since(session, day), held_since(session, day)
    taken = beside if tenant is None else [row for row in beside if row.tenant == tenant]
    if tenant is None:
        return _ledger(session, taken, beside, held)
    return _ledger(session, taken, beside, _those(held, taken))


def ledger_of_batch(session: Session, batch_id: UUID) -> Ledger:
    """Of one batch, whenever it ran."""
    pairs = {(row.engine_id, row.day) for row in taken_by(session, batch_id)}
    if not pairs:
        return Ledger([], [], [], {}, {}, {})
    beside = taken_beside(session, pairs)  # read once: what others did and what the batch did are of one moment
    taken = [row for row in beside if row.batch_id == batch_id]
    return _ledger(session, taken, beside, _those(held_since(session, min(day for _, day in pairs)), taken))


def _those(held: Sequence[HeldDay], taken: Sequence[Taken]) -> list[HeldDay]:
    """The days of engines of which something was taken."""
    pairs = {(row.engine_id, row.day) for row in taken}
    return [day for day in held if (day.engine_id, day.day) in pairs]


def _ledger(session: Session, taken: Sequence[Taken], beside: Sequence[Taken], held: Sequence[HeldDay]) -> Ledger:
    engines = engines_by_id(session, {row.engine_id for row in taken} | {day.engine_id for day in held})
    return Ledger(
        taken=taken,
        beside=beside,
        held=with_own_endpoints(held, taken, engines, now=utc_now()),
        engines=engines,
        key_names=key_names(session, sorted({row.key_id for row in taken} - {""})),
        input_names=input_names(session, {row.batch_id for row in taken} - {SINGLE}),
    )


def with_own_endpoints(
    held: Sequence[HeldDay], taken: Sequence[Taken], engines: Mapping[int, KnownEngine], *, now: datetime
) -> list[HeldDay]:
    """The days of engines, and those of own endpoints whose hour has a price: whole days on which they answered.

    Nobody counts how long these are held: from midnight, or since they were added, to midnight or now. One that was
    given another price is another row from then on.
    """
    found = list(held)
    counted = {(day.engine_id, day.day) for day in held}
    for engine_id, day in sorted({(row.engine_id, row.day) for row in taken} - counted):
        engine = engines.get(engine_id)
        price = None if engine is None else engine.description.get("hour_price")
        if engine is None or engine.description.get("kind") != "endpoint" or price is None:
            continue
        begin = datetime(day.year, day.month, day.day, tzinfo=UTC)
        end = min([now, begin + timedelta(days=1), *_replaced(engine, engines.values())])
        up_s = max(0.0, (end - max(begin, engine.since)).total_seconds())
        cost = int(Decimal(str(price)) * NANOS * Decimal(up_s) / _HOUR_S)
        found.append(HeldDay(engine_id, day, up_s, 0.0, 0.0, 0.0, 0.0, 0.0, cost))
    return found


def _replaced(engine: KnownEngine, engines: Iterable[KnownEngine]) -> Iterator[datetime]:
    """When other rows of the same endpoint began after this one."""
    for other in engines:
        if other.since > engine.since and engine_name(other, other.id) == engine_name(engine, engine.id):
            yield other.since


def engine_name(engine: KnownEngine | None, engine_id: int) -> str:
    """What people call an engine or endpoint."""
    if engine is None:
        return f"engine {engine_id}"
    described = engine.description
    if described.get("kind") == "endpoint":
        return str(described.get("name"))
    return f"{described.get('kind', 'engine')} {described.get('checkpoint') or described.get('url') or ''}".strip()
