"""What the gateway says of costs: the members of a report, money in the currency's unit."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from pipeline.costs import Group


class Money(BaseModel):
    """An amount of a currency."""

    amount: float
    currency: str


class CostLineObject(BaseModel):
    """What one batch, key, day or endpoint took and cost."""

    name: str
    jobs: int
    tokens_in: int
    tokens_out: int
    tokens_in_cached: int
    cost: float = Field(description="billed and own together")
    billed: float = Field(description="what priced endpoints asked")
    own: float = Field(description="its part of what own engines cost")
    managed: float | None = Field(description="what a managed API would have asked for the same tokens")
    jobs_without_price: int = Field(description="jobs on own engines whose hour has no price; not in cost")


class EngineUseObject(BaseModel):
    """How an own engine was used: shares from 0 to 1, null where nothing is known."""

    name: str
    hours: float
    busy: float | None
    slots: float | None
    gpu: float | None
    cost: float | None


class ComparisonObject(BaseModel):
    """Own engines beside a managed API; `break_even` is the utilisation from which on they are cheaper."""

    own: float
    managed: float
    tokens: int
    utilisation: float | None
    break_even: float | None


class CostReportObject(BaseModel):
    """A report; `lines` add up to `total`. `engines` are for admin keys: they tell of others' work too."""

    object: Literal["costs"] = "costs"
    by: Group
    currency: str
    lines: list[CostLineObject]
    total: CostLineObject
    engines: list[EngineUseObject]
    comparison: ComparisonObject | None
    sentence: str
