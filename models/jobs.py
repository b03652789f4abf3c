"""What a worker holds while it runs jobs: the job as loaded, the result as written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.states import Outcome, Source


@dataclass(frozen=True, slots=True)
class Job:
    """One unfinished job of a claimed shard. `body` is the request's JSON, `stoker` its line's own settings as JSON.

    `tries` counts transient failures, `engine_deaths` the engines that died while it was in flight.
    """

    seq: int
    body: str
    tries: int
    engine_deaths: int = 0
    stoker: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, as the endpoint counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class JobResult:
    """What one job ended with: `response` is the endpoint's JSON, or an error code and message stand instead.

    A rejection by the endpoint (4xx) has both: its status code and body as response, outcome failed.
    """

    seq: int
    outcome: Outcome
    source: Source = Source.ENGINE
    status_code: int | None = None
    response: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    usage: Usage = Usage()
    duration_ms: int = 0
    entry: int | None = None
    """The cache entry that it came from."""
    namespace: int | None = None
    similarity: float | None = None
    stoker: str | None = None
    """A JSON object: members of the result line's `stoker`."""
    engine_id: int | None = None
    """The row of what answered it, where that is not its worker's own engine."""
    cost: int | None = None
    """What a priced endpoint asks for it, in nanos of the currency's unit."""

    @property
    def was_generated(self) -> bool:
        """Whether an engine did the job just now: a refusal comes at once and says nothing of how long jobs take."""
        return self.source is Source.ENGINE and self.outcome is not Outcome.FAILED


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer that an engine gave before, and the tokens that it took. `expires_at` is in seconds of the epoch."""

    entry: int
    response: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Affixes:
    """What the prompts of a batch begin and end with."""

    prefix: str = ""
    suffix: str = ""


def cost_sum(costs: Iterable[int | None]) -> int | None:
    """What several requests cost together, in nanos; None if none of them was billed."""
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known else None


def failed(seq: int, *, code: str, message: str, source: Source = Source.NONE) -> JobResult:
    """The result of a job that never got a response."""
    return JobResult(seq=seq, outcome=Outcome.FAILED, source=source, error_code=code, error_message=message)
