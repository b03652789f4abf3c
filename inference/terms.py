"""What a request may do on its way to an endpoint, and whom the router asks: who pays, and what all workers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from models.endpoints import EndpointSpec, Grant, Prices, RatesSeen
from models.states import Trust

PATIENCE_S: Final = 60.0  # while all that could answer are broken; longer, and the job waits in Postgres


class Payer(Protocol):
    """The money for one job's requests to priced endpoints."""

    async def pay(self, prices: Prices, path: str, body: bytes, *, spills: bool) -> int:
        """Reserve the most that it may cost: how many nanos; 0 where waiting may help.

        `spills`: an own endpoint could do it, so that the batch must need the help of others.
        """
        ...

    def ended(self, reserved: int, *, spent: int) -> None:
        """A request is over for which so much was reserved, and this is what it has cost."""
        ...


class Limits(Protocol):
    """Limits that all workers share."""

    async def take(self, spec: EndpointSpec, *, tokens: int) -> Grant: ...

    async def settle(self, spec: EndpointSpec, grant: Grant, *, tokens: int | None) -> None: ...

    async def learn(self, spec: EndpointSpec, seen: RatesSeen | None, *, throttled: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request may be answered. `stopped`: one that was not sent by then raises Stopped.

    `alone`: by the worker's engine only, whatever it may do to that one. `patience_s`: how long it waits while every
    endpoint that could answer is broken.
    """

    trust: Trust = Trust.OWN
    alone: bool = False
    stopped: Callable[[], bool] = lambda: False
    payer: Payer | None = None
    patience_s: float = PATIENCE_S


PLAIN: Final = Terms()
