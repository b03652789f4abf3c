"""What is known of an endpoint: where it is, what it answers to, what it asks for it and how much it bears.

A secret is never part of it: `key_env` and `key_file` say where a worker finds one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.jobs import Usage
from models.states import Trust
from runtime.settings import Price

NANOS: Final = 1_000_000_000  # money is counted in billionths of the currency's unit: a BIGINT holds nine billion units
_TOKENS_PRICED: Final = 1_000_000  # prices are for so many tokens

EndpointName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$")]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Prices(BaseModel):
    """What a million tokens cost, in the currency that the installation counts in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Price = Decimal(0)
    output: Price = Decimal(0)
    cached: Price | None = None
    """Of prompt tokens that the endpoint had in its prefix cache; None: as `input`."""

    def cost_nanos(self, usage: Usage) -> int:
        """What an answer costs, in nanos, rounded up."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        read = self.input * (usage.prompt_tokens - cached) + (self.cached_price * cached)
        return _nanos(read + self.output * usage.completion_tokens)

    def most_nanos(self, *, prompt_tokens: int, output_tokens: int) -> int:
        """The most that a request of so many tokens can cost, in nanos."""
        return _nanos(max(self.input, self.cached_price) * prompt_tokens + self.output * output_tokens)

    @property
    def cached_price(self) -> Decimal:
        """Of a million prompt tokens from the prefix cache."""
        return self.input if self.cached is None else self.cached

    @property
    def is_free(self) -> bool:
        """Whether nothing is asked for tokens."""
        return not (self.input or self.output or self.cached)


class EndpointSpec(BaseModel):
    """An endpoint beside the workers' own engines, as `stoker endpoints add` or the file of endpoints states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: EndpointName
    url: Text
    """`http(s)://host:port[/prefix][/v1]` or `unix:///path`."""
    models: dict[Text, Text] = Field(min_length=1)
    """What jobs call a model → what the endpoint calls it."""
    serves: Literal["generation", "embeddings"] = "generation"
    trust: Trust = Trust.EXTERNAL
    auth: Literal["bearer", "api-key", "x-api-key"] = "bearer"
    """The header that the key goes into: `Authorization: Bearer`, `api-key` (Azure), `x-api-key`."""
    key_env: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable of a worker that has the key."""
    key_file: Path | None = None
    """The file on a worker's machine that has the key; it may have a newline at its end."""
    prices: Prices = Prices()
    hour_price: Price | None = None
    """Of an own endpoint: what its machine costs an hour, whether it works or not."""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None
    """Requests at once, of all workers together; None: each child finds out what it bears."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share of the work among endpoints that are alike in everything else."""

    @model_validator(mode="after")
    def _fits(self) -> EndpointSpec:
        if self.key_env is not None and self.key_file is not None:
            raise ValueError("state key_env or key_file, not both")
        if self.trust is Trust.OWN and not self.prices.is_free:
            raise ValueError("an own endpoint has no price a token; state hour_price, or trust external")
        if self.trust is Trust.EXTERNAL and self.hour_price is not None:
            raise ValueError("hour_price is of own endpoints; an external one has prices a token")
        return self

    @property
    def is_priced(self) -> bool:
        """Whether its answers are billed by the token."""
        return not self.prices.is_free

    def checkpoint(self, alias: str) -> str:
        """What decides its answers for an alias, as far as can be known: where it runs, and what it calls the model."""
        named = f"{self.url}\n{self.models[alias]}"
        return f"endpoint:{hashlib.sha256(named.encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class RatesSeen:
    """What an answer's headers say of its endpoint's limits; None where they do not.

    Of a minute: how many requests and tokens there are, how many are left, and in how many seconds all are there again.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_s: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: float | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to send a request now, where `wait_s` is 0.0; else ask again after so long.

    `lease`: its place among the requests at once, to be given up.
    """

    wait_s: float
    lease: str = ""


def _nanos(millionths: Decimal) -> int:
    """A price of a million tokens times tokens, as nanos."""
    return int((millionths * (NANOS // _TOKENS_PRICED)).to_integral_value(rounding=ROUND_CEILING))
