"""Asking the engine for one unit: a job, waiting for an equal one, asked twice or in several requests, or a pack."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from inference.embeddings import Pack
from inference.replies import result_of
from models.jobs import Job, JobResult
from models.line_settings import read_settings
from models.names import request_name
from models.states import Outcome
from pipeline.attempt import Attempt, Unit
from pipeline.budgets import BudgetWaits, tokens_of
from pipeline.cached import says_the_same
from pipeline.context import FeedContext
from pipeline.converse import converse
from pipeline.retry import waiting
from pipeline.steps import StepFailed, Steps
from pipeline.validated import validated
from runtime.clock import utc_now
from runtime.errors import StokerError, Stopped
from runtime.tracing import span
from store.shards import Claim, Retry


async def ask(context: FeedContext, attempt: Attempt, unit: Unit) -> list[JobResult | Retry]:
    """Send one unit and say what became of its jobs: nothing of those that are to be asked again one by one.

    Raises what Endpoint.post raises.
    """
    try:
        if isinstance(unit, Pack):
            return await _ask_pack(context, attempt, unit)
        if unit.seq in attempt.looked.steps:
            return await _ask_in_steps(context, attempt, unit)
        return [await _awaited(context, attempt, unit) or await _ask_one(context, attempt, unit)]
    except Stopped:
        return []


async def _ask_pack(context: FeedContext, attempt: Attempt, unit: Pack) -> list[JobResult | Retry]:
    path, first = attempt.claim.endpoint, unit.jobs[0].seq
    reply = await context.router.post(
        path, unit.body, request_id=request_name(attempt.claim.batch_id, first), terms=attempt.terms()
    )
    if 400 <= reply.status_code < 500 and len(unit.jobs) > 1:
        attempt.ask_again(unit.singles())
        return []
    return [*unit.split(reply)]


async def _ask_in_steps(context: FeedContext, attempt: Attempt, job: Job) -> list[JobResult | Retry]:
    """What became of a job of several requests: nothing if its attempt ended between two of them."""
    steps = Steps(
        attempt,
        job,
        router=context.router,
        states=context.steps,
        served=context.pace.served,
    )
    try:
        with span("job", attributes={"stoker.job.seq": job.seq}):
            async with steps:
                return [await _done_in(steps, context, attempt.claim, job)]
    except StepFailed as error:
        return [error.result]
    except BudgetWaits as error:
        return [replace(waiting(job, now=utc_now()), error=str(error))]


async def _done_in(steps: Steps, context: FeedContext, claim: Claim, job: Job) -> JobResult | Retry:
    settings = read_settings(job.stoker or "{}")
    if settings.turns is not None:
        window_tokens = settings.window_tokens or context.settings.engine.context_tokens
        return await converse(
            steps,
            job,
            settings,
            claim,
            database=context.database,
            window_tokens=window_tokens,
            retrieval=context.retrieval,
        )
    if context.recipes is None:
        return steps.failed(code="recipe_unavailable", message="this worker does no recipes")
    return await context.recipes(steps, job, settings, claim)


async def _ask_one(context: FeedContext, attempt: Attempt, job: Job) -> JobResult:
    path, name = attempt.claim.endpoint, request_name(attempt.claim.batch_id, job.seq)
    reply = await context.router.post(path, job.body.encode(), request_id=name, terms=attempt.terms())
    first = result = result_of(job.seq, path, reply)
    if attempt.claim.validates:
        result = await validated(context, attempt, job, first)
    if job.seq in attempt.looked.twice and result.outcome is Outcome.SUCCEEDED and result.engine_id is None:
        taken = tokens_of(first.usage) if result is first else 0  # a repair has told of both
        with suppress(StokerError):  # the answer is there; a second one that fails, or is too dear, only says nothing
            async with attempt.covering(job.seq, job.body, taken=taken) as cover:
                terms = replace(attempt.terms(), alone=True)  # the same engine, or it would say nothing of it
                reply = await context.router.post(path, job.body.encode(), request_id=name, terms=terms)
                again = result_of(job.seq, path, reply)
                cover.tokens = tokens_of(again.usage)
            attempt.repeated[job.seq] = says_the_same(result, again)
            if attempt.funds is not None:
                attempt.funds.add_beside(job.seq, tokens_of(again.usage))
    return result


async def _awaited(context: FeedContext, attempt: Attempt, job: Job) -> JobResult | Retry | None:
    """What becomes of a job that equals one which runs elsewhere: that one's answer, or more waiting.

    None: there is nothing to wait for, or no longer; it runs itself.
    """
    cache, claim = context.cache, attempt.claim
    if cache is None or job.seq not in attempt.looked.awaited:
        return None
    request = attempt.looked.requests[job.seq]

    def ask() -> tuple[JobResult | None, bool]:
        waits = cache.is_awaited(claim, job, request)
        with context.database.transaction() as session:
            found = cache.ask_again(session, claim, job, request)
        return found, found is None and waits

    found, waits = await asyncio.to_thread(ask)
    return waiting(job, now=utc_now()) if waits else found
