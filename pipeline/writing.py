"""Writing what an attempt has learned: one transaction, under its fence, safe to repeat.

It must not decide when; that is the feed's (pipeline/feed.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from models.jobs import JobResult, failed
from models.states import Source
from pipeline.attempt import Attempt, Unwritten
from pipeline.context import FeedContext
from pipeline.counting import Written, count_written, followers_written
from pipeline.lookups import Lookups
from runtime.errors import LostFence, ServiceUnreachable, Unstorable
from runtime.logs import get_logger
from runtime.metrics import WRITE_SECONDS
from runtime.tracing import span
from store.database import Session
from store.shards import close, give_back, quarantine, write_results, write_retries
from store.steps import delete_steps, write_steps

log = get_logger(__name__)

Patience = Callable[[], bool]
"""Whether to go on trying."""


class Writer:
    """Writes for one feed."""

    def __init__(self, context: FeedContext, lookups: Lookups) -> None:
        self._context = context
        self._lookups = lookups

    async def write(self, attempt: Attempt, unwritten: Unwritten, *, is_over: bool, patience: Patience) -> None:
        """Write it, and the end of the attempt if it is over.

        Again and again while Postgres is away, as results in hand are not thrown away, until `patience` says no. Raises
        LostFence if another attempt owns the shard: nothing was written then.
        """
        while True:
            try:
                return await asyncio.to_thread(self._write, attempt, unwritten, is_over=is_over)
            except ServiceUnreachable as error:
                if not patience():
                    raise LostFence from error  # the process must end; the lease gives the jobs to another
                log.warning("write_waits", error=str(error))
                await asyncio.sleep(1.0)

    def _write(self, attempt: Attempt, unwritten: Unwritten, *, is_over: bool) -> None:
        with span("write") as seen:
            if seen.is_recorded:
                seen.set({"stoker.results": len(unwritten.results), "stoker.bytes": _bytes_of(unwritten)})
            try:
                written = [self._transact(attempt, unwritten, is_over=is_over)]
            except Unstorable:
                written = [self._write_alone(attempt, result) for result in unwritten.results]
                written.append(self._transact(attempt, replace(unwritten, results=[]), is_over=is_over))
        count_written(written)  # not before the last: all begins again where Postgres goes in between

    def _write_alone(self, attempt: Attempt, result: JobResult) -> Written:
        try:
            return self._transact(attempt, Unwritten([result]), is_over=False)
        except Unstorable as error:
            refused = failed(result.seq, code="unstorable_response", message=str(error), source=Source.ENGINE)
            return self._transact(attempt, Unwritten([refused]), is_over=False)

    def _transact(self, attempt: Attempt, unwritten: Unwritten, *, is_over: bool) -> Written:
        """One transaction: results, retries, steps, suspects apart, and the end of the attempt if it is over.

        Raises LostFence if another attempt owns the shard; nothing was written then.
        """
        cache, semantic, kept = self._context.cache, self._context.semantic, None
        ended = [result.seq for result in unwritten.results if result.seq in attempt.looked.steps]
        began = time.monotonic()
        with attempt.stating(unwritten), self._context.database.transaction() as session:
            if not self._write_under_fence(session, attempt, unwritten):
                raise LostFence
            followers = followers_written(session, attempt.claim, unwritten.results)
            charged = delete_steps(session, attempt.claim.batch_id, ended) if ended else {}
            if cache is not None:
                kept = cache.keep(session, attempt.claim, attempt.looked, unwritten.results, attempt.repeated)
            if attempt.funds is not None:
                attempt.funds.settle(session, charged, unwritten.unfunded)
            if attempt.purse is not None:
                attempt.purse.settle(session)
            # Last: both lock the batch's row, for which other shards wait.
            if unwritten.suspects and not quarantine(session, attempt.claim, unwritten.suspects):
                raise LostFence
            if is_over and not (
                close(session, attempt.claim) or give_back(session, attempt.claim, wait_s=attempt.give_back_s)
            ):
                raise LostFence
        WRITE_SECONDS.observe(time.monotonic() - began)
        if self._context.steps is not None:
            self._context.steps.forget(attempt.claim.batch_id, ended)
        if cache is not None and kept is not None:
            with self._lookups.never_stopping(attempt.claim):
                cache.publish(kept)
                if semantic is not None and kept.entries:
                    semantic.add(kept.entries)
        return Written(unwritten.results, followers, len(unwritten.retries))

    def _write_under_fence(self, session: Session, attempt: Attempt, unwritten: Unwritten) -> bool:
        held, lease_s = attempt.claim, self._context.settings.worker.lease_s
        results, steps, engine_id = unwritten.results, unwritten.steps, self._context.engine_id()
        if attempt.funds is not None:
            if not attempt.funds.write(session, results, steps, engine_id=engine_id, lease_s=lease_s):
                return False
        else:
            if results and write_results(session, held, results, engine_id=engine_id, lease_s=lease_s) is None:
                return False
            if steps and not write_steps(session, held, steps, lease_s=lease_s):
                return False
        return not unwritten.retries or write_retries(session, held, unwritten.retries)


def _bytes_of(unwritten: Unwritten) -> int:
    answers = sum(len(result.response or "") for result in unwritten.results)
    return answers + sum(len(step.reply) for step in unwritten.steps)
