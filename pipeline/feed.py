"""Feeding an engine from claimed shards: the asyncio loop of one worker child.

One call holds one or more shards: it sends their jobs concurrently, and claims the next shard as soon as
its share of the engine would fall, so that a slow job never leaves the engine half empty. Results are
written as they come, only while the fence holds. Any line may be the last that runs: what was not written
is still unfinished in Postgres and will be claimed again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import UUID

from inference.embeddings import PATH as EMBEDDINGS
from inference.embeddings import Pack, pack
from inference.endpoint import EndpointDown, ServerFault
from models.jobs import Job, JobResult, failed
from models.states import Source, Trust
from pipeline.asking import ask
from pipeline.attempt import Attempt, Unit
from pipeline.budgets import Funds
from pipeline.cached import Looked
from pipeline.context import FeedContext as FeedContext
from pipeline.lookups import Lookups
from pipeline.purse import Purse
from pipeline.quarantine import DEATHS_TO_QUARANTINE, isolate
from pipeline.retry import after_engine_death, after_failure
from pipeline.traced import end_shard
from pipeline.writing import Writer
from runtime.clock import utc_now
from runtime.errors import LostFence, Permanent, ServiceUnreachable, Transient
from runtime.logs import get_logger
from runtime.metrics import FENCES_LOST, SHARD_SECONDS, SHARDS_RUNNING
from store.database import Session
from store.shards import (
    Claim,
    LoadedJobs,
    claim_next,
    is_alone,
    is_reserved,
    load_jobs,
)

log = get_logger(__name__)
T = TypeVar("T")

TICK_S = 0.2  # how soon a drain, a due write or a newly dispatched shard is noticed while nothing else happens
MOST_ATTEMPTS, LEAST_STARTED = 8, 8  # at once in a child with endpoints beside its engine; jobs of each under way
LOOK_S = 0.25  # between two looks for a batch that has work for an idle endpoint
HELD_BYTES = 256 * 1024 * 1024  # chosen: of bodies in one child, with one more shard at most when it claims
DOWN_PATIENCE_S = 60.0


@dataclass(slots=True)
class FeedReport:
    """What one call did."""

    shards: int = 0
    jobs: int = 0


async def feed(context: FeedContext) -> FeedReport:
    """Run the shard that is to go first, and then others while there are some; returns when it holds none.

    The hint's own shard may have been claimed by a child that ran ahead, or recalled: any hint is as good as another,
    and the order is Postgres's. No shard to claim is no error: the report is empty. Safe to run twice or to die at
    any line: the fence guards every write.
    """
    return await _Feeder(context).run()


class _Feeder:
    def __init__(self, context: FeedContext) -> None:
        self._context = context
        self._attempts: dict[tuple[int, int], Attempt] = {}
        self._report = FeedReport()
        self._wake = asyncio.Event()
        self._write_wanted = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._yield_at = time.monotonic() + context.settings.worker.yield_s
        self._grace_until: float | None = None
        self._next_claim_at = self._next_look_at = 0.0
        self._lookups = Lookups(context)
        self._writer = Writer(context, self._lookups)
        self._claiming: asyncio.Task[None] | None = None

    async def run(self) -> FeedReport:
        if await self._is_served():
            await self._claim()
        try:
            if self._attempts:
                async with asyncio.TaskGroup() as group:
                    writer = group.create_task(self._write_loop())
                    await self._feed_loop(group)
                    writer.cancel()
        finally:
            for attempt in self._attempts.values():  # after a defect only: their leases end and are recovered
                self._context.heartbeat.remove(attempt.claim)
                attempt.lose()
                end_shard(attempt.span, is_lost=True)
            SHARDS_RUNNING.set(0)
            await self._lookups.finish()
        return self._report

    async def _is_served(self) -> bool:
        """Wait a little if every endpoint refused connections or a shard runs alone here; claim nothing then.

        False after DOWN_PATIENCE_S: the shard stays dispatched and its hint is sent again.
        """
        await self._context.refresh()
        until = time.monotonic() + DOWN_PATIENCE_S
        while await self._context.router.is_down() or await self._is_reserved():
            if self._context.draining() or time.monotonic() >= until:
                return False
            await asyncio.sleep(TICK_S)
        return True

    async def _is_reserved(self) -> bool:
        return bool(
            await self._read(
                lambda session: is_reserved(session, engine=self._context.engine, worker=self._context.worker)
            )
        )

    async def _read(self, question: Callable[[Session], bool]) -> bool | None:
        """Ask Postgres; None while it does not answer."""

        def ask() -> bool:
            with self._context.database.transaction() as session:
                return question(session)

        try:
            return await asyncio.to_thread(ask)
        except ServiceUnreachable as error:
            log.warning("postgres_waits", error=str(error))
            return None

    async def _feed_loop(self, group: asyncio.TaskGroup) -> None:
        while self._attempts or self._claiming is not None:
            self._wind_down_if_told()
            self._start_units()
            if self._claiming is None and self._may_claim():
                if self._is_hungry():
                    self._claiming = group.create_task(self._claim_ahead())
                elif self._looks_for_others():
                    others = {attempt.claim.batch_id for attempt in self._attempts.values()}
                    self._claiming = group.create_task(self._claim_ahead(but=others))
            self._wake.clear()
            await _wait(self._wake, timeout_s=TICK_S)

    async def _claim_ahead(self, *, but: Collection[UUID] = ()) -> None:
        """Claim while what is there is sent; if there was nothing to claim, look again in a while."""
        began = time.monotonic()
        try:
            found = await self._claim(but=but)
            now = time.monotonic()
            if found:
                self._context.pace.claimed(now - began)
            elif but:
                self._next_look_at = now + LOOK_S
            else:
                self._next_claim_at = now + TICK_S
        finally:
            self._claiming = None
            self._wake.set()

    def _wind_down_if_told(self) -> None:
        now = time.monotonic()
        if self._grace_until is None and self._context.draining():
            self._grace_until = now + self._context.settings.worker.grace_s
        if self._is_stopping(now):
            for attempt in self._attempts.values():
                attempt.stop()
                if self._grace_until is not None and now >= self._grace_until:
                    attempt.abandon_in_flight()
            self._write_wanted.set()

    def _is_stopping(self, now: float) -> bool:
        return self._grace_until is not None or now >= self._yield_at

    def _is_patient(self) -> bool:
        """Whether this process may wait for Postgres: not when its grace is over."""
        return self._grace_until is None or time.monotonic() <= self._grace_until

    def _may_claim(self) -> bool:
        now, attempts = time.monotonic(), self._attempts.values()
        if now < self._next_claim_at or self._is_stopping(now):
            return False
        if any(attempt.endpoint_is_down or attempt.claim.runs_alone for attempt in attempts):
            return False
        return sum(attempt.held_bytes for attempt in attempts) < HELD_BYTES

    def _looks_for_others(self) -> bool:
        """Whether to claim of another batch, as an endpoint beside the engine has nothing to do."""
        may = time.monotonic() >= self._next_look_at and len(self._attempts) < MOST_ATTEMPTS
        return may and self._context.router.is_idle_beside()

    def _is_hungry(self) -> bool:
        """Whether what waits would not last until the next shard is here."""
        waiting = sum(len(attempt.waiting) for attempt in self._attempts.values())
        return waiting - self._free() < self._context.pace.reserve(self._places())

    def _free(self) -> int:
        return self._places() - sum(len(attempt.in_flight) for attempt in self._attempts.values())

    def _places(self) -> int:
        """How many jobs may be under way, where one of those that are here may go."""
        claims = [attempt.claim for attempt in self._attempts.values() if attempt.claim.trust is Trust.EXTERNAL]
        trust = Trust.EXTERNAL if claims else Trust.OWN
        return self._context.router.places(trust, pays=any(claim.paid for claim in claims))

    def _start_units(self) -> None:
        free = self._free()
        least = LEAST_STARTED if self._context.router.routes else 0  # its endpoint may not be the one that is full
        for attempt in self._attempts.values():
            while attempt.waiting and (free > 0 or len(attempt.in_flight) < least):
                self._spawn(attempt, self._run_unit(attempt, attempt.waiting.popleft()))
                free -= 1

    def _spawn(self, attempt: Attempt, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            attempt.in_flight.discard(task)
            self._wake.set()
            if attempt.wants_write():
                self._write_wanted.set()

        task = self._loop.create_task(work, context=attempt.context.copy())
        attempt.in_flight.add(task)
        task.add_done_callback(ended)

    async def _within(self, attempt: Attempt, work: Coroutine[Any, Any, T]) -> T:
        """Work of the feed's own for an attempt, as its jobs do theirs: its ids are on what is logged."""
        return await self._loop.create_task(work, context=attempt.context.copy())

    async def _run_unit(self, attempt: Attempt, unit: Unit) -> None:
        jobs = unit.jobs if isinstance(unit, Pack) else (unit,)
        error = await self._outcome(attempt, unit)
        if error is None:
            return
        attempt.endpoint_is_down = True
        attempt.stop()
        if isinstance(error, EndpointDown) and not error.was_sent:
            return
        for job in jobs:
            attempt.record(after_engine_death(job, error, now=utc_now()))
            if job.engine_deaths + 1 >= DEATHS_TO_QUARANTINE:
                attempt.suspects.append(job.seq)

    async def _outcome(self, attempt: Attempt, unit: Unit) -> Transient | None:
        """Send one unit and record what became of its jobs: the one place that maps errors to outcomes.

        If the engine was not there, or died under it, nothing is recorded and the error is returned.
        """
        jobs = unit.jobs if isinstance(unit, Pack) else (unit,)
        try:
            for result in await ask(self._context, attempt, unit):
                attempt.record(result)
                is_one_request = isinstance(unit, Job) and unit.seq not in attempt.looked.steps
                if is_one_request and isinstance(result, JobResult) and result.was_generated:
                    self._context.pace.served(result.duration_ms / 1000)
        except (EndpointDown, ServerFault) as error:
            is_absent = isinstance(error, EndpointDown) and not error.was_sent
            if is_absent or not await self._is_healthy(attempt):
                return error
            self._retry(attempt, jobs, error)
        except Transient as error:
            self._retry(attempt, jobs, error)
        except Permanent as error:
            for job in jobs:
                attempt.record(failed(job.seq, code=error.code, message=str(error)))
        except Exception as error:  # a defect of ours ends the job with a traceback in the log, never a shard for ever
            log.exception("job_defect", batch_id=str(attempt.claim.batch_id), seqs=[job.seq for job in jobs])
            for job in jobs:
                attempt.record(failed(job.seq, code="internal_error", message=f"{type(error).__name__}: {error}"))
        return None

    async def _is_healthy(self, attempt: Attempt) -> bool:
        """Whether the engine lives, after an error that it may have died of; where there is none it did not."""
        engine = self._context.router.engine_for(attempt.claim.endpoint)
        if engine is None:
            return True
        engine.is_down = not await engine.endpoint.is_healthy()
        return not engine.is_down

    async def _run_alone(self, attempt: Attempt, suspects: list[Job]) -> None:
        """Run suspects once no other shard is on their engine, or in their worker."""

        async def engine_is_up() -> bool:
            while not attempt.is_stopped:
                alone = await self._read(lambda s: is_alone(s, attempt.claim))
                if alone and await self._is_healthy(attempt):
                    return True
                await asyncio.sleep(TICK_S)
            return False

        async def survives(job: Job) -> bool:
            while (error := await self._outcome(attempt, job)) is not None:
                if not isinstance(error, EndpointDown) or error.was_sent:
                    return False
                if not await engine_is_up():  # it never reached the engine: no death of its
                    return True
                await asyncio.sleep(TICK_S)
            return True

        def convict(job: Job, deaths: int) -> None:
            message = f"the engine died {deaths} times in a row while this job was alone on it"
            log.error("poison_job", batch_id=str(attempt.claim.batch_id), seq=job.seq)
            attempt.record(failed(job.seq, code="poison_job", message=message, source=Source.ENGINE))

        await isolate(suspects, survives=survives, engine_is_up=engine_is_up, convict=convict)

    def _retry(self, attempt: Attempt, jobs: tuple[Job, ...], error: Transient) -> None:
        max_tries = self._context.settings.limits.max_tries
        for job in jobs:
            tried = replace(job, tries=0) if job.seq in attempt.advanced else job  # its tries are of one step
            attempt.record(after_failure(tried, error, max_tries=max_tries, now=utc_now()))

    async def _claim(self, *, but: Collection[UUID] = ()) -> bool:
        """Claim the shard that is to go first, of no batch of `but`, and take its jobs in; false if there was none."""
        await self._context.refresh()  # its jobs may name what was registered while this task ran
        try:
            taken = await asyncio.to_thread(self._take, but)
        except ServiceUnreachable as error:
            log.warning("claim_failed", error=str(error))
            return False
        if taken is None:
            return False
        claimed, loaded = taken
        attempt = Attempt(claimed, loaded)
        if claimed.paid:
            limits = self._context.settings.limits
            attempt.purse = Purse(self._context.database, claimed, most_output=limits.max_output_tokens)

        def on_beat(runnable: bool | None) -> None:
            self._loop.call_soon_threadsafe(self._on_beat, attempt, runnable)

        self._context.heartbeat.add(claimed, on_beat)
        try:
            looked = await self._within(attempt, self._lookups.look_up(claimed, loaded))
            if claimed.budgeted and claimed.runnable:
                looked = await self._funded(attempt, looked)
            is_plain = claimed.runnable and not claimed.runs_alone
            attempt.begin(looked, self._units(claimed, looked.jobs) if is_plain else ())
        except BaseException:  # nobody knows of it yet: its lease must end
            self._context.heartbeat.remove(claimed)
            end_shard(attempt.span, is_lost=True)
            raise
        if claimed.runnable and claimed.runs_alone:
            for other in self._attempts.values():
                other.stop()
            self._spawn(attempt, self._run_alone(attempt, looked.jobs))
        self._attempts[claimed.key] = attempt
        SHARDS_RUNNING.set(len(self._attempts))
        self._report.shards += 1
        self._write_wanted.set()
        return True

    def _take(self, but: Collection[UUID]) -> tuple[Claim, LoadedJobs] | None:
        context = self._context
        with context.database.transaction() as session:
            claimed = claim_next(
                session,
                holder=context.holder,
                lease_s=context.settings.worker.lease_s,
                engine=context.engine,
                worker=context.worker,
                but=but,
            )
            return None if claimed is None else (claimed, load_jobs(session, claimed))

    async def _funded(self, attempt: Attempt, looked: Looked) -> Looked:
        """What was looked up, of the jobs to run only those that are paid for; what never can be has ended."""
        most_output = self._context.settings.limits.max_output_tokens
        attempt.funds = Funds(self._context.database, attempt.claim, most_output=most_output)
        funding = await attempt.funds.fund_soon(looked.jobs, looked.steps)
        attempt.unfunded = funding.waiting
        return replace(looked, jobs=funding.jobs, results=[*looked.results, *funding.refused])

    def _go_on(self, attempt: Attempt) -> None:
        """Start what a write has left room for in a budget."""
        funding = None if attempt.funds is None else attempt.funds.go_on()
        if funding is not None:
            attempt.go_on(funding, self._units(attempt.claim, funding.jobs))
            self._write_wanted.set()
            self._wake.set()

    def _units(self, claimed: Claim, jobs: list[Job]) -> Iterator[Unit]:
        if claimed.endpoint != EMBEDDINGS:
            yield from jobs
            return
        limits = self._context.settings.embeddings
        yield from pack(jobs, max_tokens=limits.pack_tokens, max_inputs=limits.pack_inputs)

    def _on_beat(self, attempt: Attempt, runnable: bool | None) -> None:
        if runnable is None:
            attempt.lose()
        elif not runnable:
            attempt.stop()
        self._write_wanted.set()

    async def _write_loop(self) -> None:
        """Write what is due and end the attempts that are over; the only place that writes, one at a time."""
        while True:
            self._write_wanted.clear()
            for attempt in list(self._attempts.values()):
                if attempt.wants_write():
                    await self._within(attempt, self._write_and_end(attempt))
            await _wait(self._write_wanted, timeout_s=TICK_S)

    async def _write_and_end(self, attempt: Attempt) -> None:
        is_over = attempt.is_over
        unwritten = attempt.take_unwritten()
        try:
            if not attempt.is_lost:
                await self._writer.write(attempt, unwritten, is_over=is_over, patience=self._is_patient)
                if is_over:
                    SHARD_SECONDS.observe(time.monotonic() - attempt.claimed_at)
                self._report.jobs += len(unwritten.results)
                self._go_on(attempt)
                self._lookups.begin_chores(attempt.claim)
        except LostFence:
            attempt.lose()
            log.warning("fence_lost", shard_id=attempt.claim.shard_id, fence=attempt.claim.fence)
        if attempt.is_lost or is_over:
            FENCES_LOST.add(attempt.is_lost)
            self._context.heartbeat.remove(attempt.claim)
            self._attempts.pop(attempt.claim.key, None)
            SHARDS_RUNNING.set(len(self._attempts))
            end_shard(attempt.span, is_lost=attempt.is_lost)
            self._wake.set()


async def _wait(event: asyncio.Event, *, timeout_s: float) -> None:
    """Return when the event is set, or after the time."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
