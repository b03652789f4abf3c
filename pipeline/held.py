"""Single requests that clients wait for: the gateway's part of the express queue.

One desk a gateway process, in its loop. It holds each request, says in Redis that it does, and puts it again if Redis
has lost it; its answer is told, and looked for every second besides. It must not know HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

import msgspec

from models.singles import SingleAnswer, SingleRequest
from runtime.errors import ServiceUnreachable, Transient
from runtime.logs import get_logger
from store.express import RENEW_S, ExpressQueue

log = get_logger(__name__)

REST_S: Final = 1.0  # before the next try to hear of answers


class TooManyHeld(Transient):
    """As many single requests are held open as may be."""


@dataclass(slots=True)
class _Held:
    request: SingleRequest
    key_id: str
    answer: asyncio.Future[SingleAnswer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_told: bool = False


class Desk:
    """`invite` lets a worker know that some wait; it must not block. Use it in one loop only, and close it there."""

    def __init__(self, queue: ExpressQueue, *, most: int, invite: Callable[[], None]) -> None:
        self._queue = queue
        self._most = most
        self._invite = invite
        self._door = secrets.token_hex(8)
        self._held: dict[str, _Held] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def ask(self, request: SingleRequest, *, key_id: str) -> SingleAnswer:
        """Hold a request of a key until it is answered. Cancel it, and the endpoint's work on it ends within a second.

        Raises TooManyHeld, and ServiceUnreachable if Redis does not take it.
        """
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._renew())]
        id_, held = uuid4().hex, _Held(request, key_id)
        try:
            if not await self._put(id_, held):
                raise TooManyHeld(f"{self._most:,} single requests are open already (STOKER_GATEWAY__EXPRESS_REQUESTS)")
            self._held[id_] = held
            self._invite()
            return await held.answer
        finally:
            self._held.pop(id_, None)
            if not held.answer.done() or held.answer.cancelled():
                with suppress(ServiceUnreachable):
                    await asyncio.shield(self._queue.cancel(id_))

    async def close(self) -> None:
        """Let go of everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._queue.close()

    async def _put(self, id_: str, held: _Held) -> bool:
        request = held.request
        return await self._queue.put(
            id_,
            path=request.path,
            body=request.body,
            trust=request.trust.value,
            key_id=held.key_id,
            door=self._door,
            most=self._most,
        )

    async def _hear(self) -> None:
        """Take answers as they are told."""
        while True:
            try:
                async for id_ in self._queue.told(self._door):
                    await self._take(id_)
            except ServiceUnreachable as error:
                log.warning("express_answers_not_heard", error=str(error))
                await asyncio.sleep(REST_S)

    async def _renew(self) -> None:
        """Say what is still wanted, take what was not heard, put again what is lost, call for what waits."""
        while True:
            await asyncio.sleep(RENEW_S)
            ids = list(self._held)
            if not ids:
                continue
            try:
                for id_, state in zip(ids, await self._queue.renew(ids), strict=True):
                    await self._looked_at(id_, state)
            except ServiceUnreachable as error:
                log.warning("express_not_renewed", error=str(error))

    async def _looked_at(self, id_: str, state: str) -> None:
        held = self._held.get(id_)
        if held is None or held.is_told:
            return
        if state == "answered":
            await self._take(id_)
        elif state == "gone" and not await self._put(id_, held):
            return  # too many: it is put at the next look
        if state in ("gone", "waiting"):
            self._invite()

    async def _take(self, id_: str) -> None:
        held = self._held.get(id_)
        if held is None or held.is_told:
            return
        held.is_told = True  # what Redis does not have then is not lost
        try:
            answer = await self._queue.collect(id_)
        except ServiceUnreachable:
            held.is_told = False
            raise
        if answer is None:
            held.is_told = False
        elif not held.answer.done():
            held.answer.set_result(msgspec.json.decode(answer, type=SingleAnswer))
