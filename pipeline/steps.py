"""A job of several requests: each is a step with a name, and is done once, whichever attempt did it.

A finished step's reply is in Redis before the next request is sent, and in Postgres with the attempt's next write, so
a worker that is killed repeats at most the requests that were in flight. The first reply that was kept is the step's:
an attempt that lost its fence unawares and the one after it go on from the same replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from inference import endpoint
from inference.replies import LARGEST_COUNT, result_of, said, usage_sum
from inference.router import Router
from models.jobs import Job, JobResult, Usage, cost_sum, failed
from models.line_settings import LineSettings
from models.names import request_name
from models.states import Outcome
from pipeline.attempt import Attempt
from pipeline.budgets import tokens_of
from runtime.errors import Permanent, StokerError, Stopped, Transient
from store.shards import Claim, Retry
from store.step_states import StepStates
from store.steps import FinishedStep

STEPS_AT_ONCE: Final = 4  # of one job; chosen: a long document's parts side by side, beside the jobs of others


class StepFailed(StokerError):
    """The job has ended with `result`, at one of its requests."""

    def __init__(self, result: JobResult) -> None:
        super().__init__(result.error_message)
        self.result = result


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request of a job was answered. `response` is the endpoint's JSON, `text` what its first choice says.

    No lone surrogate is in `text`, so it may go into another request. `calls_tools`: it asks for a tool to be called.
    """

    text: str
    usage: Usage
    finish_reason: str
    response: str
    status_code: int
    outcome: Outcome
    duration_ms: int
    calls_tools: bool
    engine_id: int | None
    cost: int | None


class Steps:
    """One job's requests. Use it in `async with`: what it still asks when the block ends with the job is abandoned."""

    def __init__(
        self,
        attempt: Attempt,
        job: Job,
        *,
        router: Router,
        states: StepStates | None,
        served: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`served` hears how many seconds each request took; `seq` is the job's."""
        self._attempt = attempt
        self.seq = job.seq
        self._router = router
        self._states = states
        self._served = served
        self._finished = attempt.looked.steps[job.seq]
        self._replies: dict[str, Reply] = {}
        self._room = asyncio.Semaphore(STEPS_AT_ONCE)
        self._asking: set[asyncio.Task[Any] | None] = set()
        self._is_open = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """If the job goes on in a later attempt, wait for the replies to what is in flight."""
        self._is_open = False
        left = {task for task in self._asking if task is not None and task is not asyncio.current_task()}
        try:
            if left and isinstance(error, Stopped | Transient):
                await asyncio.wait(left)
        finally:
            for task in left:
                task.cancel()

    async def ask(self, name: str, fields: Mapping[str, Any]) -> Reply:
        """The reply to the request with this body, sent only if no attempt has finished the step `name`.

        Names are a job's own, and the same in each of its attempts. STEPS_AT_ONCE are in flight at most. Raises
        Stopped, StepFailed if the endpoint refuses it or it fails for good, and else what Endpoint.post raises.
        """
        if name not in self._finished:
            task = asyncio.current_task()
            self._asking.add(task)
            try:
                async with self._room:
                    await self._finish(name, fields)
            finally:
                self._asking.discard(task)
        reply = self._replies[name] = _read(self._finished[name], self.seq, self._attempt.claim.endpoint)
        return reply

    def result(self, reply: Reply, *, outcome: Outcome | None = None, stoker: str | None = None) -> JobResult:
        """The job's result: this reply, the last one say, with the tokens and time of all steps."""
        return JobResult(
            self.seq,
            outcome or reply.outcome,
            status_code=reply.status_code,
            response=reply.response,
            usage=self._usage,
            duration_ms=self._duration_ms,
            stoker=stoker,
            engine_id=reply.engine_id,
            cost=cost_sum(one.cost for one in self._replies.values()),
        )

    def failed(self, *, code: str, message: str) -> JobResult:
        """The job's result where its replies are of no use, with the tokens that they took."""
        return self._billed(failed(self.seq, code=code, message=message))

    async def _finish(self, name: str, fields: Mapping[str, Any]) -> None:
        if self._attempt.is_stopped or not self._is_open:
            raise Stopped
        batch_id, path = self._attempt.claim.batch_id, self._attempt.claim.endpoint
        body, request_id = msgspec.json.encode(fields), f"{request_name(batch_id, self.seq)}_{name}"
        try:
            async with self._attempt.covering(self.seq, body) as cover:
                terms = self._attempt.terms()
                answer = await self._router.post(path, body, request_id=request_id, terms=terms)
                cover.tokens = await self._keep(name, answer)
        except Permanent as error:
            raise StepFailed(self.failed(code=error.code, message=str(error))) from error

    async def _keep(self, name: str, answer: endpoint.Reply) -> int:
        """Keep the answer, or the one that another attempt has had: how many tokens it took."""
        batch_id, path = self._attempt.claim.batch_id, self._attempt.claim.endpoint
        result = result_of(self.seq, path, answer)
        if result.outcome is Outcome.FAILED:
            raise StepFailed(self._billed(result))
        self._served(answer.duration_ms / 1000)
        kept = _Kept(answer.status_code, answer.duration_ms, result.response or "", result.engine_id, result.cost)
        reply = msgspec.json.encode(kept).decode()
        tokens = tokens_of(result.usage)
        if self._states is not None:
            stands = await asyncio.to_thread(self._states.keep, batch_id, self.seq, name, reply)
            if stands and stands != reply:
                reply, tokens = stands, kept_tokens(stands, path)
        self._finished[name] = reply
        self._attempt.record_step(FinishedStep(self.seq, name, reply, tokens))
        return tokens

    def _billed(self, result: JobResult) -> JobResult:
        cost = cost_sum([result.cost, *(one.cost for one in self._replies.values())])
        return replace(result, usage=self._usage, duration_ms=self._duration_ms + result.duration_ms, cost=cost)

    @property
    def _usage(self) -> Usage:
        return usage_sum([reply.usage for reply in self._replies.values()])

    @property
    def _duration_ms(self) -> int:
        return min(sum(reply.duration_ms for reply in self._replies.values()), LARGEST_COUNT)


Recipes = Callable[[Steps, Job, LineSettings, Claim], Awaitable[JobResult | Retry]]
"""What does the jobs that state a recipe; a Retry is a look later."""


class _Kept(msgspec.Struct):
    status_code: int
    duration_ms: int
    response: str
    engine_id: int | None = None
    cost: int | None = None


def _read(kept: str, seq: int, path: str) -> Reply:
    """A finished step's reply, from what was kept of it."""
    stored = msgspec.json.decode(kept, type=_Kept)
    result = result_of(seq, path, endpoint.Reply(stored.status_code, stored.response.encode(), stored.duration_ms))
    first = said(path, stored.response)
    return Reply(
        text=first.text,
        usage=result.usage,
        finish_reason=first.finish_reason,
        response=stored.response,
        status_code=stored.status_code,
        outcome=result.outcome,
        duration_ms=stored.duration_ms,
        calls_tools=first.calls_tools,
        engine_id=stored.engine_id,
        cost=stored.cost,
    )


def kept_tokens(reply: str, path: str) -> int:
    """How many tokens a finished step took, from what was kept of it."""
    return tokens_of(_read(reply, 0, path).usage)
