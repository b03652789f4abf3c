"""Money as text: it is counted in nanos, billionths of the currency's unit."""

from __future__ import annotations

import math

from models.endpoints import NANOS


def plain(nanos: int) -> str:
    """An amount with all its digits and no more, such as `0.000123`; it is a number of JSON too."""
    whole, rest = divmod(abs(nanos), NANOS)
    digits = f"{rest:09d}".rstrip("0")
    return f"{'-' if nanos < 0 else ''}{whole}{'.' if digits else ''}{digits}"


def shown(nanos: int, currency: str) -> str:
    """An amount for people, such as `1,204.50 USD`, or `0.000123 USD`: three digits that say something at the least."""
    amount = abs(nanos) / NANOS
    places = 2 if amount >= 1 or not nanos else min(9, 3 - math.ceil(math.log10(amount)))
    return f"{nanos / NANOS:,.{max(2, places)}f} {currency}"
