"""When a schedule is due: a cron expression in a time zone, and what becomes of due times that were missed.

Cron as Debian's reads it. In the hour that a clock skips or repeats: what has a fixed minute and hour runs once, at the
first moment after a gap; what has a star there follows real time. Nothing here reads a clock or a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from models.states import Missed
from runtime.errors import BadInput

MOST_MISSED: Final = 100  # runs that one look makes of a schedule
_FIRST_SPAN: Final = timedelta(hours=1)
_NAMED: Final = {
    "@yearly": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


@dataclass(frozen=True, slots=True)
class Owed:
    """The due times that get a run, in UTC and in their order, and the newest of those that were let go."""

    runs: Sequence[datetime]
    let_go: datetime | None = None


def zone_of(name: str) -> ZoneInfo:
    """The time zone. Raises BadInput for a name that is none, with those that are like it."""
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError) as error:
        near = difflib.get_close_matches(name, available_timezones(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ", such as UTC or Europe/Berlin"
        raise BadInput(f"{name!r:.80} is no time zone of the IANA database{hint}") from error


def checked_cron(cron: str, zone: ZoneInfo, *, after: datetime) -> datetime:
    """The first due time of an expression. Raises BadInput if it is none, or never due."""
    if not cron.startswith("@") and len(cron.split()) != 5:
        raise BadInput(
            f"--cron {cron!r}: write five fields, minute hour day month weekday, such as '0 2 * * *' for each day at "
            f"02:00, or one of {', '.join(_NAMED)}"
        )
    try:
        due = next(due_times(cron, zone, after=after), None)
    except CronSimError as error:
        raise BadInput(
            f"--cron {cron!r}: {str(error).lower()}; the fields are minute hour day month weekday, of 0-59 0-23 1-31 "
            f"1-12 0-7, such as '0 2 * * *', or it is one of {', '.join(_NAMED)}"
        ) from error
    if due is None:
        raise BadInput(f"--cron {cron!r}: no such time comes in the next 50 years")
    return due


def due_times(cron: str, zone: ZoneInfo, *, after: datetime) -> Iterator[datetime]:
    """The due times after a moment, in UTC, each once and in their order."""
    expression = _NAMED.get(cron.lower(), cron)
    last = after.astimezone(UTC)
    for local in CronSim(expression, last.astimezone(zone)):
        # Two fixed times in a skipped hour are one moment; and of a repeated hour the first is meant, which was before.
        if (due := local.astimezone(UTC)) > last:
            last = due
            yield due


def owed(
    cron: str,
    zone: ZoneInfo,
    *,
    after: datetime,
    until: datetime,
    missed: Missed,
    missed_after_s: float,
) -> Owed:
    """What becomes of the due times after one moment and up to another, the newest 100 of them at most.

    All that are not late get a run. Of those that are, as `missed` says; the last one is not run where a later time
    is due anyway.
    """
    after, until = after.astimezone(UTC), until.astimezone(UTC)
    first = next(due_times(cron, zone, after=after), None)
    if first is None or first > until:  # as nearly always
        return Owed([])
    found = _newest(cron, zone, after=after, until=until, most=MOST_MISSED + 1)
    limit = timedelta(seconds=missed_after_s)
    late = [due for due in found if until - due > limit]
    on_time = found[len(late) :]
    kept: list[datetime] = []
    if missed is Missed.ALL:
        kept = late
    elif missed is Missed.ONCE and not on_time:
        kept = late[-1:]
    runs = [*kept, *on_time][-MOST_MISSED:]
    let_go = [due for due in found if due not in runs]
    return Owed(runs, let_go[-1] if let_go else None)


def _newest(cron: str, zone: ZoneInfo, *, after: datetime, until: datetime, most: int) -> list[datetime]:
    """The newest due times up to a moment, without going through all of a long time."""
    span = _FIRST_SPAN
    while True:
        begin = max(after, until - span)
        found: list[datetime] = []
        for due in due_times(cron, zone, after=begin):
            if due > until:
                break
            found.append(due)
        if len(found) >= most or begin == after:
            return found[-most:]
        span *= 4
