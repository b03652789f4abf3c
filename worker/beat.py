"""The beat: `python -m worker.beat`, kept by every control worker. One of them leads and has schedules looked for.

Celery's beat with redbeat as metronome and leader's lock: one static entry, a look every `schedule.tick_s`. What is
scheduled is rows of Postgres, because redbeat keeps no time zone for an entry, and what is in Redis may vanish: then
the lead is taken anew (docs/decisions/0038-schedules.md).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar, Final, NoReturn

from celery import Celery
from celery.beat import Service
from celery.signals import beat_init
from redbeat.schedulers import RedBeatScheduler, acquire_distributed_beat_lock

from models.messages import LookAtSchedules
from runtime.entry import run_process
from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import Settings, without_secrets
from store.redis_errors import redis_errors
from worker.celery_app import make_app
from worker.queues import HintPublisher

log = get_logger(__name__)

KEY_PREFIX: Final = "stoker:beat:"
# A leader that was killed is followed after at most the two together: the rest of its lock, and a look for it.
LOCK_S: Final = 5
TICK_S: Final = 1.0
AGAIN_S: Final = 2.0
REDIS_S: Final = 3.0  # a Redis that hangs must not outlast the lock


class Metronome(RedBeatScheduler):  # type: ignore[misc]  # redbeat has no types
    """redbeat's scheduler, whose one entry is sent as all our hints are: confirmed, and only if none waits already."""

    _maybe_due_kwargs: ClassVar[dict[str, Any]] = {}  # redbeat's has a producer, for which it would wait without end

    def __init__(self, app: Celery, *, publisher: HintPublisher, **options: Any) -> None:
        super().__init__(app, **options)
        self._publisher = publisher

    def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **options: Any) -> None:
        """Send a look; a broker that is away is told of, and asked again at the next one."""
        del producer, advance, options
        self.reserve(entry)
        try:
            self._publisher.look_at_schedules()
        except ServiceUnreachable as error:
            log.warning("look_not_sent", error=str(error))


def run_beat(settings: Settings) -> None:
    """Lead or stand by until SIGTERM; begin anew when Redis was away, or was emptied and the lead is lost."""
    logging.getLogger("celery.beat").setLevel(logging.WARNING)  # it tells of every look
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    app = make_app(settings)
    app.conf.update(beat_conf(settings))
    publisher = HintPublisher(app, delivery_limit=settings.broker.delivery_limit)
    # Taken in _beat instead: Celery would go on without the lock if taking it fails.
    beat_init.disconnect(acquire_distributed_beat_lock)
    while True:
        try:
            with redis_errors(without_secrets(settings.require_redis())):
                _beat(app, publisher)
                return
        except ServiceUnreachable as error:
            log.warning("beat_interrupted", error=str(error))
            time.sleep(AGAIN_S)


def _beat(app: Celery, publisher: HintPublisher) -> None:
    """Until SIGTERM, at which Celery's service gives the lock back and returns."""
    service = Service(app, scheduler_cls=partial(Metronome, publisher=publisher), remote_control=False)
    scheduler = service.scheduler  # stores its entry
    log.info("beat_stands_by", pid=os.getpid())
    acquire_distributed_beat_lock(sender=service)
    log.info("beat_leads", pid=os.getpid())
    scheduler.setup_schedule()  # once more: Redis may have been emptied while we stood by
    service.start()


def beat_conf(settings: Settings) -> dict[str, Any]:
    """What Celery and redbeat are told."""
    look = {
        "task": LookAtSchedules.wire_name,
        "schedule": timedelta(seconds=settings.schedule.tick_s),
        "last_run_at": datetime(2000, 1, 1, tzinfo=UTC),  # where Redis knows of none: due at once
    }
    return {
        "beat_schedule": {"look": look},
        "beat_max_loop_interval": TICK_S,
        "result_expires": None,  # else Celery schedules the cleaning of a result backend
        "redbeat_redis_url": settings.require_redis(),
        "redbeat_redis_options": {"socket_timeout": REDIS_S, "socket_connect_timeout": REDIS_S},
        "redbeat_key_prefix": KEY_PREFIX,
        "redbeat_lock_key": f"{KEY_PREFIX}lock",
        "redbeat_lock_timeout": LOCK_S,
    }


def _exit(*_: Any) -> NoReturn:
    raise SystemExit


if __name__ == "__main__":
    run_process(run_beat)
