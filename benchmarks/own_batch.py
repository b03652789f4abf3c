"""A batch of a benchmark's own: stored, waited for, and how its last results came."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

from sqlalchemy import text

from models.lines import SubmitOptions
from models.states import CacheMode, JobOrder
from pipeline.submit import Wishes, submit_file
from runtime.settings import Settings
from store.batches import BatchProgress, batch_progress
from store.database import Database

TENANT: Final = "local"
RUN_S: Final = 900.0  # what takes longer has a worker or an engine that died
Moment = TypeVar("Moment")
TAIL: Final = 0.05  # the last jobs of a batch, as a share of them


def stored(
    database: Database,
    file: Path,
    settings: Settings,
    *,
    max_output_tokens: int = 64,
    cache: CacheMode = CacheMode.OFF,
    order: JobOrder = JobOrder.PREFIX,
) -> UUID:
    """Submit a file, always as a new batch."""
    return submit_file(
        database,
        file,
        options=SubmitOptions(max_output_tokens=max_output_tokens, cache=cache),
        settings=settings,
        served_models=None,
        reuse=False,
        tenant=TENANT,
        wishes=Wishes(order=order),
    ).batch_id


def ended(database: Database, batch_id: UUID, *, poll_s: float, most_s: float = RUN_S) -> BatchProgress:
    """The batch's end, looked for every `poll_s`; SystemExit if it is not there after `most_s`."""
    end = time.monotonic() + most_s
    while True:
        with database.transaction() as session:
            progress = batch_progress(session, batch_id, tenant=TENANT)
        if progress.is_ended:
            return progress
        if time.monotonic() > end:
            raise SystemExit(f"{progress.done} of {progress.total} jobs after {most_s:.0f} s")
        time.sleep(poll_s)


def result_times(database: Database, batch_id: UUID) -> tuple[float, float]:
    """(seconds from the first result to the last, those of them after all but the last twentieth were there)."""
    with database.transaction() as session:
        written = session.execute(
            text("SELECT created_at FROM results WHERE batch_id = :batch_id ORDER BY created_at"),
            {"batch_id": batch_id},
        ).scalars()
        moments = list(written)
    return (moments[-1] - moments[0]).total_seconds(), (moments[-1] - before_tail(moments)).total_seconds()


def before_tail(moments: Sequence[Moment]) -> Moment:
    """Of moments in their order: when all but the last twentieth had come."""
    return moments[max(0, math.ceil(len(moments) * (1 - TAIL)) - 1)]
