"""How long a worker's engine is held, and how much of that it works."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import pytest

from inference.supervisor import EngineReadings
from models.endpoints import NANOS
from store.database import Database
from store.engine_days import EngineTime, add_engine_time
from tests.support.batches import execute, rows
from tests.support.scripted_endpoint import ScriptedEndpoint
from worker.engine_hours import EngineHours, MetricsReader, stretch

BUSY = EngineReadings(running=3, waiting=1, generated_tokens=10, gpu_use=0.5)
ENGINE = 7


def days(database: Database) -> list[dict[str, Any]]:
    """All rows."""
    names = "up_s, busy_s, slot_s, slots_s, gpu_s, gpu_read_s, cost"
    found = rows(database, f"SELECT {names} FROM engine_days")
    return [dict(zip(names.split(", "), row, strict=True)) for row in found]


def test_a_reading_stands_for_the_seconds_since_the_one_before() -> None:
    assert stretch(BUSY, seconds=10, slots=4) == EngineTime(10, 10, 30, 40, 5, 10)
    assert stretch(EngineReadings(0, 0, 10), seconds=10, slots=4) == EngineTime(10, 0, 0, 40, 0, 0)
    assert stretch(EngineReadings(None, None, None), seconds=10, slots=4) == EngineTime(10, 0, 0, 0, 0, 0)


def test_an_engine_that_somebody_else_started_is_read_by_its_metrics() -> None:
    with ScriptedEndpoint() as endpoint:
        assert MetricsReader(endpoint.url, api_key=None).read().running == 0
        elsewhere = MetricsReader(f"{endpoint.url}/nowhere", api_key=None)
        assert [elsewhere.read().running, elsewhere.read().running] == [None, None]
    assert MetricsReader(endpoint.url, api_key=None).read().running is None


def test_a_worker_that_ends_leaves_its_engines_hours_and_what_they_cost(database: Database, postgres_url: str) -> None:
    hours = EngineHours(
        postgres_url,
        engine_id=ENGINE,
        slots=4,
        hour_price=Decimal("3.60"),
        is_shared=False,
        read=lambda: BUSY,
        began_at=time.monotonic() - 100,
    )
    hours.start()
    hours.stop()
    [day] = days(database)
    assert day["up_s"] == pytest.approx(100, abs=5)
    assert day["busy_s"] == day["gpu_read_s"] == day["up_s"]
    assert day["slot_s"] == pytest.approx(3 * day["up_s"])
    assert day["cost"] == pytest.approx(day["up_s"] * NANOS / 1000)


def test_engines_of_several_workers_add_up_but_one_that_they_share_is_held_once(database: Database) -> None:
    stretch_of_a_minute = EngineTime(up_s=60.0, slots_s=240.0)
    for engine_id, is_shared in ((ENGINE, False), (ENGINE, False), (8, True), (8, True)):
        with database.transaction() as session:
            add_engine_time(session, engine_id, stretch_of_a_minute, cost=NANOS, is_shared=is_shared)
    own, shared = sorted(days(database), key=lambda day: -float(day["up_s"]))
    assert (own["up_s"], own["slots_s"], own["cost"]) == (120, 480, 2 * NANOS)
    assert shared["up_s"] == pytest.approx(60, abs=3)
    assert shared["cost"] == pytest.approx(NANOS, rel=0.05)
    execute(database, "UPDATE engine_days SET counted_until = counted_until - interval '30 s' WHERE engine_id = 8")
    with database.transaction() as session:
        add_engine_time(session, 8, stretch_of_a_minute, cost=NANOS, is_shared=True)
    assert min(day["up_s"] for day in days(database)) == pytest.approx(90, abs=3)
