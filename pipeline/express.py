"""Answering single requests: the asyncio loop of the express node's child, many at once, each within its lease.

A hint only says that some wait: Redis says which, and who has them. Any line may be the last that runs: a lease that
is not extended ends, and the next child runs the request again. It must not know how a request came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from inference.endpoint import EndpointDown, Reply
from inference.replies import result_of
from inference.router import Router
from inference.terms import Terms
from models.singles import ENGINE_DIED, SingleAnswer
from models.states import Outcome, Trust
from pipeline.purse import KeyPurse
from runtime.errors import Permanent, ServiceUnreachable, Stopped, Transient
from runtime.logs import get_logger
from runtime.metrics import SINGLE_SECONDS, SINGLES
from store.express import RENEW_S, ClaimedRequest, ExpressQueue

log = get_logger(__name__)

# Chosen: an engine that is starting anew is worth some seconds to a client who waits; longer, and it asks again itself.
DOWN_PATIENCE_S: Final = 10.0
DOWN_WAIT_S: Final = 0.25
SETTLE_S: Final = 3.0  # for the money of what is cancelled


@dataclass(frozen=True, slots=True)
class ExpressContext:
    """The parts of the child; `seen` is called whenever there are single requests, for who is to make room.

    `purse` makes what a key may pay for one request.
    """

    queue: ExpressQueue
    router: Router
    seen: Callable[[], None]
    engine_id: Callable[[], int | None]
    purse: Callable[[str], KeyPurse]
    refresh: Callable[[], Awaitable[None]] | None = None


class Answering:
    """The requests that this child has; lives in one loop, from `begin` to `end`."""

    def __init__(self, context: ExpressContext) -> None:
        self._context = context
        self._running: dict[asyncio.Task[None], ClaimedRequest] = {}
        self._claims = asyncio.Lock()
        self._keepers: list[asyncio.Task[None]] = []
        self._settling: set[asyncio.Task[None]] = set()
        self._is_ending = False
        self._is_full = False  # more may wait than there was room for
        self._claiming: asyncio.Task[int] | None = None

    async def begin(self) -> None:
        """Look for requests that a dead child has left, and keep the leases of all from now on."""
        if self._context.refresh is not None:
            await self._context.refresh()
        self._keepers = [asyncio.create_task(self._keep()), asyncio.create_task(self._refresh())]
        await self.claim()

    async def claim(self) -> int:
        """Take what waits, as much as there is room for: how many that were."""
        async with self._claims:
            room = max(1, self._context.router.places(Trust.EXTERNAL, pays=True)) - len(self._running)
            self._is_full = room <= 0
            if self._is_full or self._is_ending:
                return 0
            try:
                claimed = await self._context.queue.claim(room)
            except ServiceUnreachable as error:
                log.warning("express_waits", error=str(error))
                return 0
            self._is_full = len(claimed) == room
            if self._is_ending:
                await self._give_back(claimed)
                return 0
            for one in claimed:
                self._start(one)
            return len(claimed)

    async def end(self, *, grace_s: float) -> None:
        """Claim no more, let what runs come to its end, and give the rest back."""
        self._is_ending = True
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        left = dict(self._running)
        for task in (*left, *self._keepers):
            task.cancel()
        if left:
            await self._give_back(list(left.values()))
            await asyncio.wait(left, timeout=SETTLE_S)
        if self._settling:
            await asyncio.wait(self._settling, timeout=SETTLE_S)

    async def _give_back(self, claimed: Sequence[ClaimedRequest]) -> None:
        log.info("express_given_back", requests=len(claimed))
        try:
            await self._context.queue.give_back(claimed)
        except ServiceUnreachable as error:
            log.warning("express_not_given_back", error=str(error))

    def _start(self, claimed: ClaimedRequest) -> None:
        self._context.seen()

        def ended(task: asyncio.Task[None]) -> None:
            del self._running[task]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("express_defect", request=claimed.id, exc_info=error)
            if self._is_full and not self._is_ending:
                self._claiming = asyncio.create_task(self.claim())

        task = asyncio.create_task(self._answer(claimed))
        self._running[task] = claimed
        task.add_done_callback(ended)

    async def _answer(self, claimed: ClaimedRequest) -> None:
        began = asyncio.get_running_loop().time()
        try:
            answer = await self._outcome(claimed)
        except Stopped:  # it was not sent, and is another's now
            await self._give_back([claimed])
            return
        SINGLES.add(1, outcome=_counted_as(answer))
        SINGLE_SECONDS.observe(asyncio.get_running_loop().time() - began)
        try:
            await self._context.queue.answer(claimed, msgspec.json.encode(answer))
        except ServiceUnreachable as error:  # its lease ends, and it is run again
            log.warning("express_answer_lost", request=claimed.id, error=str(error))

    async def _outcome(self, claimed: ClaimedRequest) -> SingleAnswer:
        """What became of it: the one place that maps errors to answers."""
        try:
            reply = await self._reply(claimed)
        except Transient as error:
            has_died = isinstance(error, EndpointDown) and error.was_sent  # perhaps of this request
            code = ENGINE_DIED if has_died else "unavailable"
            return SingleAnswer(code=code, message=str(error))
        except Permanent as error:
            return SingleAnswer(code=error.code, message=str(error))
        except Stopped:
            raise
        except Exception as error:  # a defect of ours is an answer too, with a traceback in the log
            log.exception("express_defect", request=claimed.id)
            return SingleAnswer(code="internal_error", message=type(error).__name__)
        result = result_of(0, claimed.path, reply)
        return SingleAnswer(
            status_code=result.status_code,
            response=result.response,
            code=result.error_code if result.outcome is Outcome.FAILED else None,
            message=result.error_message,
            usage=result.usage,
            engine_id=result.engine_id or self._context.engine_id(),
            cost=result.cost,
        )

    async def _reply(self, claimed: ClaimedRequest) -> Reply:
        """The endpoint's answer; waits for an engine that is not there, as nothing was sent."""
        loop = asyncio.get_running_loop()
        until = loop.time() + DOWN_PATIENCE_S
        purse = self._context.purse(claimed.key_id)
        terms = Terms(
            trust=Trust(claimed.trust), stopped=lambda: self._is_ending, payer=purse, patience_s=DOWN_PATIENCE_S
        )
        try:
            while True:
                try:
                    return await self._context.router.post(
                        claimed.path, claimed.body, request_id=claimed.id, terms=terms
                    )
                except EndpointDown as error:
                    if error.was_sent or loop.time() >= until:
                        raise
                    await asyncio.sleep(DOWN_WAIT_S)
        finally:  # the answer does not wait for it
            settling = asyncio.create_task(purse.settle())
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)

    async def _refresh(self) -> None:
        """Learn which endpoints are registered, apart from all else: Postgres may be slow or away."""
        while self._context.refresh is not None:
            await self._context.refresh()
            await asyncio.sleep(RENEW_S)

    async def _keep(self) -> None:
        """Extend the leases; what is no longer ours ends, and with it the endpoint's work on it."""
        while True:
            await asyncio.sleep(RENEW_S)
            if not self._running:
                continue
            self._context.seen()
            held = dict(self._running)
            try:
                kept = await self._context.queue.extend(list(held.values()))
            except ServiceUnreachable as error:
                log.warning("express_leases_not_extended", error=str(error))
                continue
            for task, claimed in held.items():
                if claimed.id not in kept and not task.done():
                    log.info("express_cancelled", request=claimed.id)
                    task.cancel()


def _counted_as(answer: SingleAnswer) -> str:
    if answer.code is None:
        return "ok"
    return "down" if answer.code in ("unavailable", ENGINE_DIED) else "failed"
