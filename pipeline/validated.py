"""Answers of a batch that validates: each is held to the JSON schema that its own request states, with one repair.

The schema is the request's `response_format`, so what is checked is what the engine was told. Requests without one
have nothing to be checked by.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count
from typing import Final

import msgspec

from cache.keys import read_body
from inference.replies import Said, result_of, said, usage_sum
from models.jobs import Job, JobResult, cost_sum, failed
from models.names import request_name
from models.states import Outcome, Source
from pipeline.attempt import Attempt
from pipeline.budgets import WAIT_S, BudgetExceeded, BudgetWaits, tokens_of
from pipeline.context import FeedContext
from pipeline.forms import SHOWN_CHARACTERS, form_of
from runtime.errors import Stopped

CODE: Final = "invalid_answer"
CHAT: Final = "/v1/chat/completions"
LOOKS_AT_BUDGET: Final = 30  # a second apart: others give up what they have reserved with each of their writes
_REPAIR: Final = "That answer is not valid: {fault}\nAnswer again, with valid JSON only."


async def validated(context: FeedContext, attempt: Attempt, job: Job, result: JobResult) -> JobResult:
    """The result, if its answer is valid; else that of one more request, which says what was wrong; else a failure.

    All of them count the tokens of both. Raises Stopped if nothing more may be asked, and what Endpoint.post raises.
    """
    path = attempt.claim.endpoint
    try:
        fault, answer = _fault(path, job, result)
    except ValueError as error:
        return _ended(result, code="invalid_schema", message=str(error))
    if fault is None:
        return result
    if result.outcome is Outcome.TRUNCATED or path != CHAT:
        cut = "the answer was cut by its limit of tokens; raise that (its JSON takes some 10 beside what it says)"
        return _ended(result, message=f"{cut if result.outcome is Outcome.TRUNCATED else fault}. {_shown(answer)}")
    return await _repaired(context, attempt, job, result, answer, fault)


async def _repaired(
    context: FeedContext, attempt: Attempt, job: Job, result: JobResult, answer: Said, fault: str
) -> JobResult:
    try:
        again = await _asked_again(context, attempt, job, answer, fault, taken=tokens_of(result.usage))
    except (BudgetExceeded, BudgetWaits, ValueError) as error:  # the last one: what cannot be read as JSON here
        return _ended(result, message=f"{fault}; not repaired: {error}. {_shown(answer)}")
    both = replace(
        again,
        usage=usage_sum([result.usage, again.usage]),
        duration_ms=result.duration_ms + again.duration_ms,
        cost=cost_sum([result.cost, again.cost]),
    )
    if again.outcome is Outcome.FAILED:
        return _ended(both, message=f"{fault}; its repair failed: {again.error_message}. {_shown(answer)}")
    left, answer = _fault(attempt.claim.endpoint, job, again)
    if left is None:
        return replace(both, stoker='{"repaired":true}')
    return _ended(both, message=f"{left}; also after one repair. {_shown(answer)}")


def _fault(path: str, job: Job, result: JobResult) -> tuple[str | None, Said]:
    """What is wrong with an answer, and what it says. Raises ValueError if its request's schema is wrong."""
    schema = None if result.outcome is Outcome.FAILED else form_of(job.body)
    answer = Said() if schema is None else said(path, result.response or "")
    if schema is None or answer.calls_tools:
        return None, answer
    return schema.fault(answer.text), answer


async def _asked_again(
    context: FeedContext, attempt: Attempt, job: Job, answer: Said, fault: str, *, taken: int
) -> JobResult:
    path, fields = attempt.claim.endpoint, read_body(job.body)
    messages = [
        *fields["messages"],
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": _REPAIR.format(fault=fault)},
    ]
    body = msgspec.json.encode({**fields, "messages": messages})
    name = f"{request_name(attempt.claim.batch_id, job.seq)}_repair"
    for look in count(1):
        if attempt.is_stopped:
            raise Stopped
        try:
            async with attempt.covering(job.seq, body, taken=taken) as cover:
                terms = attempt.terms()
                result = result_of(job.seq, path, await context.router.post(path, body, request_id=name, terms=terms))
                cover.tokens = tokens_of(result.usage)
            return result
        except BudgetWaits:
            if look == LOOKS_AT_BUDGET:
                raise
        await asyncio.sleep(WAIT_S)
        taken = 0  # it was told
    raise AssertionError("it counts on")


def _ended(result: JobResult, *, message: str, code: str = CODE) -> JobResult:
    """The failure that stands instead of this answer, with what it took."""
    ended = failed(result.seq, code=code, message=message, source=Source.ENGINE)
    return replace(
        ended,
        usage=result.usage,
        duration_ms=result.duration_ms,
        engine_id=result.engine_id,
        cost=result.cost,
    )


def _shown(answer: Said) -> str:
    return f"The answer: {answer.text[:SHOWN_CHARACTERS]}"
