"""The control node's tasks: look for schedules that are due, and run one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.messages import LookAtSchedules, RunSchedule
from pipeline.schedules import Execute, look, run_schedule
from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import ScheduleSettings
from store.database import Database

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ControlContext:
    """What the two tasks are given."""

    database: Database
    settings: ScheduleSettings
    publish: Callable[[Sequence[RunSchedule]], None]
    execute: Execute
    note_look: Callable[[], None]


def look_at_schedules(context: ControlContext, message: LookAtSchedules) -> None:
    """Make runs of what is due and send a hint for each that waits; tell when it was done, for `stoker doctor`.

    Safe to run twice and to die at any line: a due time has one run, and a hint that was lost is sent again by a later
    look. Always ends so that the message is acknowledged.
    """
    try:
        due = look(context.database, settings=context.settings)
        if due:
            context.publish(due)
        context.note_look()  # last: without Redis hints are sent all the same
    except ServiceUnreachable as error:
        log.warning("schedules_not_seen", hint=message.wire_name, error=str(error))


def run_one(context: ControlContext, message: RunSchedule) -> str | None:
    """Run it, unless another has; says what came of it.

    Safe to run twice and to die at any line: the message is only a hint, the run's fence guards its row, and its
    lease runs out. A submit that is run again makes no second batch: its run is its idempotency key. Always ends so
    that the message is acknowledged.
    """
    try:
        return run_schedule(context.database, message, execute=context.execute, settings=context.settings)
    except ServiceUnreachable as error:
        log.warning("schedule_run_interrupted", schedule=message.schedule, run=message.run_id, error=str(error))
        return None
