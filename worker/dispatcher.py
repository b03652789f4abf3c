"""The dispatch process: `python -m worker.dispatcher`, started by every worker and by `stoker dispatch`."""

from __future__ import annotations

import signal
import threading

from pipeline.dispatch import dispatch_until
from runtime.entry import run_process
from runtime.metrics import metrics_served
from runtime.settings import Settings
from runtime.tracing import start_tracing, stop_tracing
from store.database import Database
from store.presence import PresenceBoard
from worker.celery_app import make_app
from worker.queues import HintPublisher


def run_dispatcher(settings: Settings) -> None:
    """Lead or stand by until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    start_tracing(settings, process="dispatcher")
    database = Database(settings.require_postgres(), pool_size=2, by_key=True)
    board = PresenceBoard(settings.require_redis())
    publisher = HintPublisher(make_app(settings), delivery_limit=settings.broker.delivery_limit)
    try:
        with metrics_served(settings.metrics):
            dispatch_until(stop, database=database, publisher=publisher, board=board, settings=settings)
    finally:
        publisher.close()
        board.close()
        database.close()
        stop_tracing()


if __name__ == "__main__":
    run_process(run_dispatcher)
