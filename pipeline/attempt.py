"""One claimed shard in one process: what waits, what is in flight, what is not yet written."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

from inference.embeddings import Pack
from inference.terms import Terms
from models.jobs import Job, JobResult
from pipeline.budgets import WAIT_S as BUDGET_WAIT_S
from pipeline.budgets import Cover, Funding, Funds
from pipeline.cached import Looked
from pipeline.purse import Purse
from pipeline.traced import shard_traced
from runtime.clock import utc_now
from store.shards import Claim, LoadedJobs, Retry
from store.steps import FinishedStep

# A write transaction costs one fsync whatever its size. Measured: 10.8x the rows/s of single rows at 64 a
# commit, 13x at 256. Half a second's worth at most is there to repeat after a kill.
FLUSH_ROWS = 256
FLUSH_BYTES = 4 * 1024 * 1024
FLUSH_AFTER_S = 0.5
DOWN_WAIT_S = 2.0  # how long a shard stays away from workers after its endpoint refused connections

Unit = Job | Pack
"""What is sent as one request: a job, or embedding jobs packed together."""


@dataclass(frozen=True, slots=True)
class Unwritten:
    """What an attempt has learned since its last write; `suspects` are seqs that leave it for quarantine."""

    results: list[JobResult]
    retries: list[Retry] = field(default_factory=list)
    suspects: list[int] = field(default_factory=list)
    steps: list[FinishedStep] = field(default_factory=list)
    unfunded: list[Job] = field(default_factory=list)
    """Jobs that a budget may have room for, once this is written."""

    @property
    def ended(self) -> set[int]:
        """The jobs that will ask for nothing more in this attempt."""
        return {*(result.seq for result in self.results), *(retry.seq for retry in self.retries), *self.suspects}


class Attempt:
    """The state of one run of a shard. Lives in the asyncio loop's thread."""

    def __init__(self, claim: Claim, loaded: LoadedJobs) -> None:
        self.claim = claim
        self.claimed_at = time.monotonic()
        self.span, self.context = shard_traced(claim, jobs=len(loaded.jobs))
        self.looked = Looked()
        self.held_bytes = 0  # of bodies and finished steps: the requests to keep hold theirs until the shard is over
        self.repeated: dict[int, bool] = {}  # of jobs that were asked twice: whether the answers were the same
        self.waiting: deque[Unit] = deque()
        self.funds: Funds | None = None  # of a batch with budgets of tokens
        self.purse: Purse | None = None  # of one with budgets of money
        self.unfunded: list[Job] = []  # jobs that wait until a budget has room for them
        self.in_flight: set[asyncio.Task[None]] = set()
        self.is_lost = False
        self.is_stopped = False
        self.endpoint_is_down = False
        self.suspects: list[int] = []
        self.advanced: set[int] = set()  # jobs that have finished a step in it
        self._next_due: datetime | None = loaded.next_due
        self._results: list[JobResult] = []
        self._retries: list[Retry] = []
        self._steps: list[FinishedStep] = []
        self._unwritten_bytes = 0
        self._unwritten_since = 0.0

    def begin(self, looked: Looked, units: Iterable[Unit]) -> None:
        """What its jobs' lookups gave is known: results are kept for the next write, the rest waits to be sent."""
        self.looked = replace(looked, results=[], jobs=[])
        self.held_bytes = sum(sys.getsizeof(job.body) for job in (*looked.jobs, *self.unfunded))
        self.held_bytes += sum(sys.getsizeof(reply) for replies in looked.steps.values() for reply in replies.values())
        for outcome in looked.results:
            self.record(outcome)
        if self.is_stopped:
            self.unfunded = []
        else:
            self.waiting.extend(units)

    @property
    def _is_idle(self) -> bool:
        return not self.waiting and not self.in_flight

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: nothing waits or is in flight, and no write will fund jobs left."""
        return self._is_idle and not self._may_be_funded

    @property
    def _may_be_funded(self) -> bool:
        """Whether the next write may leave room in a budget for jobs that wait; none joins suspects that run alone."""
        return bool(self.unfunded and (self._results or self._retries)) and not self.claim.runs_alone

    @property
    def give_back_s(self) -> float:
        """How long its shard stays away: until its first job may run, or its endpoint had time to return."""
        if self.endpoint_is_down:
            return DOWN_WAIT_S
        waits = [BUDGET_WAIT_S] if self.unfunded else []
        if self._next_due is not None:
            waits.append(max(0.0, (self._next_due - utc_now()).total_seconds()))
        return min(waits, default=0.0)

    def record(self, outcome: JobResult | Retry) -> None:
        """Keep a result or a retry until the next write."""
        self._begin_unwritten()
        if isinstance(outcome, Retry):
            self._retries.append(outcome)
            self._next_due = min(filter(None, (self._next_due, outcome.not_before)))
        else:
            retrieved = self.looked.retrieved.get(outcome.seq)
            result = outcome if retrieved is None else retrieved.tell(outcome)
            self._results.append(result)
            self._unwritten_bytes += len(result.response or "") + len(result.stoker or "")

    def record_step(self, step: FinishedStep) -> None:
        """Keep a finished step until the next write."""
        self._begin_unwritten()
        self._steps.append(step)
        self.advanced.add(step.seq)
        self._unwritten_bytes += len(step.reply)

    def _begin_unwritten(self) -> None:
        if not self._unwritten_rows:
            self._unwritten_since = time.monotonic()

    @property
    def _unwritten_rows(self) -> int:
        return len(self._results) + len(self._retries) + len(self._steps)

    def wants_write(self) -> bool:
        """Whether what is recorded should be written now."""
        rows = self._unwritten_rows
        return (
            self._is_idle
            or rows >= FLUSH_ROWS
            or self._unwritten_bytes >= FLUSH_BYTES
            or (rows > 0 and time.monotonic() - self._unwritten_since >= FLUSH_AFTER_S)
        )

    def take_unwritten(self) -> Unwritten:
        """Everything recorded since the last call, but for steps of jobs that have ended."""
        ended = {result.seq for result in self._results} if self._steps else set()
        steps = [step for step in self._steps if step.seq not in ended]
        unfunded = self.unfunded if self._may_be_funded else []
        taken = Unwritten(self._results, self._retries, self.suspects, steps, unfunded)
        self._results, self._retries, self.suspects, self._steps, self._unwritten_bytes = [], [], [], [], 0
        return taken

    def stop(self) -> None:
        """Start nothing more; what is in flight goes on."""
        self.is_stopped = True
        self.waiting.clear()
        self.unfunded = []

    def go_on(self, funding: Funding, units: Iterable[Unit]) -> None:
        """Jobs that waited for a budget are paid for, as units to send, or never will be, or go on waiting."""
        for refused in funding.refused:
            self.record(refused)
        if not self.is_stopped:
            self.unfunded = funding.waiting
            self.waiting.extend(units)

    @contextmanager
    def stating(self, unwritten: Unwritten) -> Iterator[None]:
        """Around the transaction that writes this."""
        with ExitStack() as stack:
            if self.funds is not None:
                stack.enter_context(self.funds.stating(unwritten.ended, unwritten.steps))
            if self.purse is not None:
                stack.enter_context(self.purse.stating())
            yield

    @asynccontextmanager
    async def covering(self, seq: int, body: str | bytes, *, taken: int = 0) -> AsyncIterator[Cover]:
        """Around one more request of a job than its first, in a budget if there is one; see Funds.covering."""
        if self.funds is None:
            yield Cover()
            return
        async with self.funds.covering(seq, body, taken=taken) as cover:
            yield cover

    def terms(self) -> Terms:
        """How its jobs' requests may be answered."""
        return Terms(self.claim.trust, self.claim.quarantined, lambda: self.is_stopped, self.purse)

    def ask_again(self, units: Iterable[Unit]) -> None:
        """Put units in front of those that wait, unless nothing more is to start."""
        if not self.is_stopped:
            self.waiting.extendleft(units)

    def lose(self) -> None:
        """The fence is lost: abandon everything."""
        self.is_lost = True
        self.stop()
        self.take_unwritten()
        self.abandon_in_flight()

    def abandon_in_flight(self) -> None:
        """Cancel the requests in flight; their jobs stay unfinished."""
        for task in self.in_flight:
            task.cancel()
