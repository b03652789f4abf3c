"""Hints for the express node, sent from a process whose own threads must not wait for a broker: the gateway's."""

from __future__ import annotations

import threading

from celery import Celery

from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import Settings
from worker.queues import HintPublisher

log = get_logger(__name__)


class Inviter(threading.Thread):
    """Sends one hint for all that were asked for since the one before: who gets it takes everything that waits."""

    def __init__(self, settings: Settings) -> None:
        """Raises BadInput if no broker is named; connects at the first hint."""
        super().__init__(name="inviter", daemon=True)
        app = Celery("stoker", broker=settings.require_broker(), set_as_current=False)
        self._publisher = HintPublisher(app, delivery_limit=settings.broker.delivery_limit)
        self._wanted = threading.Event()
        self._is_over = False

    def invite(self) -> None:
        """Let the express node know soon; never waits."""
        self._wanted.set()

    def stop(self) -> None:
        """End the thread and the connection."""
        self._is_over = True
        self._wanted.set()
        self.join()

    def run(self) -> None:
        """Until `stop`; a broker that is away is told of when it is there again and somebody still waits."""
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._is_over:
                break
            try:
                self._call()
            except ServiceUnreachable as error:
                log.warning("express_not_invited", error=str(error))
        self._publisher.close()

    def _call(self) -> None:
        try:
            self._publisher.call_express()
        except ServiceUnreachable:  # perhaps only this connection has ended, which nothing but its use shows
            self._publisher.call_express()
