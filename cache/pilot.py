"""The pilot: the lines of a batch that run first, drawn uniformly, so that a cold namespace learns from all kinds."""

from __future__ import annotations

import math
import random
from typing import Final

PILOT_LOOKUPS: Final = 600
PILOT_SHARE: Final = 0.05


def pilot_size(lines: int) -> int:
    """Lines of a batch that run first, drawn uniformly, when their namespace is cold."""
    return min(lines, max(PILOT_LOOKUPS, math.ceil(PILOT_SHARE * lines)))


def draw_pilot(lines: int, *, seed: bytes) -> frozenset[int]:
    """The places, from 0, of the pilot's lines; the same again for the same seed."""
    return frozenset(random.Random(seed).sample(range(lines), pilot_size(lines)))  # noqa: S311  # a sample, no secret
