"""Answers that cost something, kept while they are right, or for so long that asking often costs little."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Final, Generic, TypeVar

CHEAP_S: Final = 0.02  # what is made in less is made anew for every change
SHARE: Final = 0.05  # of one thread's time that a dearer one may take at most, however often it is asked for

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Kept(Generic[Value]):
    figures: Hashable
    until: float
    value: Value


class Remembered(Generic[Value]):
    """The values of the last `most` keys. `clock` gives seconds; threads share it."""

    def __init__(self, *, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[Hashable, _Kept[Value]] = OrderedDict()
        self._making: set[Hashable] = set()
        self._lock = Lock()

    def of(self, key: Hashable, figures: Hashable, make: Callable[[], Value]) -> Value:
        """The key's value: made anew where `figures` are others than those it was made for, unless it is dear.

        While one makes it anew others have the earlier one; the very first may be made by several at once.
        """
        began = self._clock()
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and (kept.figures == figures or began < kept.until or key in self._making):
                self._kept.move_to_end(key)
                return kept.value
            self._making.add(key)
        try:
            value = make()
        finally:
            with self._lock:
                self._making.discard(key)
        ended = self._clock()
        wait_s = (ended - began) / SHARE if ended - began > CHEAP_S else 0.0
        with self._lock:
            self._kept[key] = _Kept(figures, ended + wait_s, value)
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return value
