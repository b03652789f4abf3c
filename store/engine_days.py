"""SQL of the `engine_days` rows: how long own engines were held, how much of that they worked, what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

# Of an engine that several workers share: the part of a stretch that none of them has counted. Else all of it.
_NEW = """(CASE WHEN excluded.counted_until > d.counted_until AND excluded.up_s > 0
        THEN least(1, extract(epoch FROM excluded.counted_until - d.counted_until) / excluded.up_s)
        WHEN excluded.counted_until <= d.counted_until THEN 0 ELSE 1 END)"""


@dataclass(frozen=True, slots=True)
class EngineTime:
    """A stretch of an engine's time that ends now, all in seconds; see models/cost_rows.py, EngineDay."""

    up_s: float = 0.0
    busy_s: float = 0.0
    slot_s: float = 0.0
    slots_s: float = 0.0
    gpu_s: float = 0.0
    gpu_read_s: float = 0.0


def add_engine_time(session: Session, engine_id: int, time: EngineTime, *, cost: int, is_shared: bool) -> None:
    """Add a stretch to the day of UTC that it ends on; `cost` in nanos, of the whole stretch.

    `is_shared`: other workers count the same engine, and what two have counted is one. Not repeatable otherwise: after
    an ambiguous COMMIT a stretch may be counted twice or not at all.
    """
    session.execute(
        text(f"""
        INSERT INTO engine_days AS d (engine_id, day, up_s, busy_s, slot_s, slots_s, gpu_s, gpu_read_s, cost,
            counted_until)
        VALUES (:engine_id, CAST(clock_timestamp() AT TIME ZONE 'UTC' AS date), :up_s, :busy_s, :slot_s, :slots_s,
            :gpu_s, :gpu_read_s, :cost, CASE WHEN :is_shared THEN clock_timestamp() END)
        ON CONFLICT (engine_id, day) DO UPDATE SET up_s = d.up_s + excluded.up_s * {_NEW},
            busy_s = d.busy_s + excluded.busy_s * {_NEW}, slot_s = d.slot_s + excluded.slot_s * {_NEW},
            slots_s = d.slots_s + excluded.slots_s * {_NEW}, gpu_s = d.gpu_s + excluded.gpu_s * {_NEW},
            gpu_read_s = d.gpu_read_s + excluded.gpu_read_s * {_NEW},
            cost = d.cost + CAST(round(excluded.cost * {_NEW}) AS int8),
            counted_until = greatest(d.counted_until, excluded.counted_until)"""),
        {"engine_id": engine_id, "cost": cost, "is_shared": is_shared, **asdict(time)},
    )
