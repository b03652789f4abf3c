"""Waiting for what must become true, instead of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 0.02


def wait_until(predicate: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return as soon as the predicate is true; AssertionError naming `what` if it is not within the time."""
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() >= end:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_S)
