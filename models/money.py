"""Money as text: it is counted in nanos, billionths of the currency's unit."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Annotated, Final

from pydantic import Field

from models.endpoints import NANOS

MOST: Final = 1_000_000_000  # of the currency's unit: what is counted stays far within a BIGINT of nanos

Amount = Annotated[Decimal, Field(gt=0, le=MOST, max_digits=19, decimal_places=9)]
"""What a budget of money may be, in the currency's unit."""


def nanos_of(amount: Decimal) -> int:
    """An amount of the currency's unit, in nanos; it has no more than 9 decimals."""
    return int(amount * NANOS)


def plain(nanos: int) -> str:
    """An amount with all its digits and no more, such as `0.000123`; it is a number of JSON too."""
    whole, rest = divmod(abs(nanos), NANOS)
    digits = f"{rest:09d}".rstrip("0")
    return f"{'-' if nanos < 0 else ''}{whole}{'.' if digits else ''}{digits}"


def money(nanos: int) -> float:
    """In the currency's unit: exact to 15 digits."""
    return nanos / NANOS


def shown(nanos: int, currency: str) -> str:
    """An amount for people, such as `1,204.50 USD`, or `0.000123 USD`: three digits that say something at the least."""
    amount = abs(nanos) / NANOS
    places = 2 if amount >= 1 or not nanos else min(9, 3 - math.ceil(math.log10(amount)))
    return f"{nanos / NANOS:,.{max(2, places)}f} {currency}"
