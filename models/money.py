"""Money as text: it is counted in nanos, billionths of the currency's unit."""

from __future__ import annotations

from models.endpoints import NANOS

_SMALL = NANOS // 100  # below a hundredth all digits that say something are shown


def plain(nanos: int) -> str:
    """An amount with all its digits and no more, such as `0.000123`; it is a number of JSON too."""
    whole, rest = divmod(abs(nanos), NANOS)
    digits = f"{rest:09d}".rstrip("0")
    return f"{'-' if nanos < 0 else ''}{whole}{'.' if digits else ''}{digits}"


def shown(nanos: int, currency: str) -> str:
    """An amount for people, such as `1,204.50 USD` or `0.000123 USD`."""
    if 0 < abs(nanos) < _SMALL:
        return f"{nanos / NANOS:.9f}".rstrip("0") + f" {currency}"
    return f"{nanos / NANOS:,.{2 if abs(nanos) >= NANOS or not nanos else 4}f} {currency}"
