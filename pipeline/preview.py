"""What a few rows, drawn at random, say of all of a table: tokens and seconds, each with a range.

Of each sum 95% ranges by Student's t with the correction for a finite population; rows differ, so few rows say little.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from store.results import ResultRow

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate, and the ends that the truth lies between with CONFIDENCE; one row gives none."""

    estimate: float
    least: float | None
    most: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What all rows would take."""

    prompt_tokens: Range
    completion_tokens: Range
    seconds: Range


def forecast(rows: Sequence[ResultRow], *, of: int, wall_s: float, slots: int) -> Forecast:
    """From the rows that were run, which took `wall_s` together, for `of` rows.

    Seconds are estimated at the preview's own rate. At the least all `slots` requests of the workers are in flight all
    the time, which a preview of fewer rows cannot show, and take no longer for it.
    """
    service = total([row.duration_ms / 1000 for row in rows], of=of)
    busy_s = sum(row.duration_ms for row in rows) / 1000
    at_once = max(1.0, busy_s / wall_s) if wall_s > 0 else 1.0
    full = max(at_once, float(min(slots, of)))
    seconds = Range(
        service.estimate / at_once,
        None if service.least is None else service.least / full,
        None if service.most is None else service.most / at_once,
    )
    return Forecast(
        total([float(row.prompt_tokens) for row in rows], of=of),
        total([float(row.completion_tokens) for row in rows], of=of),
        seconds,
    )


def total(values: Sequence[float], *, of: int) -> Range:
    """The sum over `of` rows that these were drawn from without replacement."""
    count = len(values)
    mean = statistics.fmean(values)
    if count == of:
        return Range(mean * of, mean * of, mean * of)
    if count < 2:
        return Range(mean * of, None, None)
    error = statistics.stdev(values) / math.sqrt(count) * math.sqrt((of - count) / (of - 1))
    off = _t(count - 1) * error * of
    return Range(mean * of, max(0.0, mean * of - off), mean * of + off)


def _t(freedom: int) -> float:
    """Student's t quantile for CONFIDENCE by the series in 1 / freedom (Abramowitz and Stegun, 26.7.5).

    Within 1% from 4 degrees of freedom on; below them exact.
    """
    if freedom <= len(_EXACT):
        return _EXACT[freedom - 1]
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


_EXACT: Final = (12.7062, 4.3027, 3.1824)
