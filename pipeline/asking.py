"""Asking the engine for one unit: a job, one that waits for an equal one, one asked twice, or a pack."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from inference.replies import result_of
from models.jobs import Job, JobResult
from models.names import request_name
from models.states import Outcome
from pipeline.attempt import Attempt, Unit
from pipeline.cached import says_the_same
from pipeline.context import FeedContext
from pipeline.retry import waiting
from runtime.clock import utc_now
from runtime.errors import StokerError
from store.shards import Retry


async def ask(context: FeedContext, attempt: Attempt, unit: Unit) -> list[JobResult | Retry]:
    """Send one unit and say what became of its jobs: nothing of those that are to be asked again one by one.

    Raises what Endpoint.post raises.
    """
    path = attempt.claim.endpoint
    if isinstance(unit, Job):
        return [await _awaited(context, attempt, unit) or await _ask_one(context, attempt, unit)]
    reply = await context.endpoint(path).post(
        path, unit.body, request_id=request_name(attempt.claim.batch_id, unit.jobs[0].seq)
    )
    if 400 <= reply.status_code < 500 and len(unit.jobs) > 1:
        attempt.ask_again(unit.singles())
        return []
    return [*unit.split(reply)]


async def _ask_one(context: FeedContext, attempt: Attempt, job: Job) -> JobResult:
    path, name = attempt.claim.endpoint, request_name(attempt.claim.batch_id, job.seq)
    reply = await context.endpoint(path).post(path, job.body.encode(), request_id=name)
    result = result_of(job.seq, path, reply)
    if job.seq in attempt.looked.twice and result.outcome is Outcome.SUCCEEDED:
        with suppress(StokerError):  # the answer is there; a second one that fails only says nothing
            again = await context.endpoint(path).post(path, job.body.encode(), request_id=name)
            attempt.repeated[job.seq] = says_the_same(result, result_of(job.seq, path, again))
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
