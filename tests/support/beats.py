"""Control workers and the one of their beats that leads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.support.processes import WorkerProcess


@dataclass(frozen=True, slots=True)
class Lead:
    """A beat that leads, since when."""

    pid: int
    since: datetime


def leading_beat(workers: Sequence[WorkerProcess]) -> Lead | None:
    """The beat that began to lead last, if it runs."""
    leads = [entry for worker in workers for entry in _entries(worker.log) if entry.get("event") == "beat_leads"]
    running = {process.pid for worker in workers for process in worker.processes() if "worker.beat" in process.command}
    last = max(leads, key=lambda entry: str(entry["timestamp"]), default=None)
    if last is None or last["pid"] not in running:
        return None
    return Lead(last["pid"], datetime.fromisoformat(last["timestamp"]))


def _entries(log: str) -> Iterator[dict[str, Any]]:
    for line in log.splitlines():
        try:
            yield dict(json.loads(line))
        except ValueError:  # Celery's banner
            continue
