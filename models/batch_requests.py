"""The body that creates a batch: the contract's fields, and ours under `stoker`."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

from models.line_settings import MOST_PASSAGES
from models.money import Amount
from models.states import CacheMode, JobOrder, Priority, Trust
from runtime.settings import LEAST_WEIGHT, MOST_WEIGHT

MOST_PAIRS, KEY_CHARACTERS, VALUE_CHARACTERS = 16, 64, 512
TEMPLATE_CHARACTERS = 65_536  # a template is a prompt; the whole body is held to the gateway's limit
MOST_TOKENS = 2**53  # what JSON's readers still count exactly
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_WINDOW = r"^([1-9][0-9]{0,7}s|[1-9][0-9]{0,5}m|[1-9][0-9]{0,3}h|[1-9][0-9]{0,2}d)$"

NoNul = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=VALUE_CHARACTERS, pattern=r"^[^\x00]*$")]
Pairs = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=KEY_CHARACTERS, pattern=r"^[^\x00]*$")],
        Annotated[str, StringConstraints(max_length=VALUE_CHARACTERS, pattern=r"^[^\x00]*$")],
    ],
    Field(max_length=MOST_PAIRS),
]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Expiry(_Asked):
    """When a file goes by itself, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)

    @property
    def age(self) -> timedelta:
        """From its creation to its end."""
        return timedelta(seconds=self.seconds)


class Webhook(_Asked):
    """Where the batch's end is told, signed per Standard Webhooks."""

    url: str = Field(min_length=8, max_length=2048, pattern=r"^https?://[^\x00-\x20]+$")


class Extras(_Asked):
    """What the contract does not have; each is as the command line's option of the same name.

    `template`, `collection`, `top_k` and `context_tokens` hold for the lines that do not state them.
    """

    cache: CacheMode | None = None
    template: Annotated[str | None, Field(min_length=1, max_length=TEMPLATE_CHARACTERS, pattern=r"^[^\x00]*$")] = None
    collection: Text | None = None
    top_k: int | None = Field(None, ge=1, le=MOST_PASSAGES)
    context_tokens: int | None = Field(None, ge=16, le=MOST_TOKENS)
    model: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    priority: Priority = Priority.NORMAL
    weight: float = Field(1.0, ge=LEAST_WEIGHT, le=MOST_WEIGHT)
    order: JobOrder = JobOrder.PREFIX
    budget_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    validate_answers: bool = False
    trust: Trust = Trust.OWN
    budget_money: Amount | None = None
    webhook: Webhook | None = None
    labels: Pairs = Field(default_factory=dict)

    @field_validator("budget_money")
    @classmethod
    def _is_used(cls, amount: Decimal | None, checked: ValidationInfo) -> Decimal | None:
        if amount is not None and checked.data.get("trust") is Trust.OWN:
            raise ValueError("would never be used, as prompts stay on own endpoints: state the trust external too")
        return amount

    @property
    def line_settings(self) -> dict[str, Any]:
        """The fields of a line's own `stoker` that are stated for all."""
        return self.model_dump(include={"template", "collection", "top_k", "context_tokens"}, exclude_none=True)


class CreateBatch(_Asked):
    """The body of POST /v1/batches."""

    input_file_id: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00]*$")
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str = Field(pattern=_WINDOW, description="24h, 90m, 7d; at most 999 days")
    metadata: Pairs | None = None
    output_expires_after: Expiry | None = None
    stoker: Extras | None = None

    @property
    def extras(self) -> Extras:
        """What is stated beyond the contract, or its defaults."""
        return self.stoker or Extras()

    @property
    def window(self) -> timedelta:
        """How long its jobs may take."""
        number, unit = int(self.completion_window[:-1]), self.completion_window[-1]
        return timedelta(**{_UNITS[unit]: number})

    def digest(self, *, key_id: str, file_digest: str) -> str:
        """What makes two creations the same, when one may be the other's repetition."""
        body = self.model_dump_json(exclude={"input_file_id"})
        return hashlib.sha256(f"{key_id}\n{file_digest}\n{body}".encode()).hexdigest()
