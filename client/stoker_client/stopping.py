"""How a thread that waits for a batch is told to stop."""

from __future__ import annotations

import threading


class Stopped(BaseException):
    """Nobody waits for what this thread does any more. It never reaches a caller."""


class Stop:
    """Set once, seen at once by whoever waits."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Let every wait and check raise from now on."""
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Wait. Raises Stopped as soon as it is set."""
        if self._event.wait(seconds):
            raise Stopped

    def check(self) -> None:
        """Raises Stopped if it is set."""
        if self._event.is_set():
            raise Stopped
