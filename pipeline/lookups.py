"""What is asked of a claimed shard's jobs before they run: their finished steps, their passages, then the caches.

Only a lookup of steps waits for Postgres; a cache that fails answers nothing and never stops a job.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from models.jobs import Job, JobResult, failed
from models.line_settings import UNREADABLE, read_settings
from pipeline.budgets import charge_ahead
from pipeline.cached import ExactCache, Looked, WithPassages
from pipeline.context import FeedContext
from pipeline.counting import count_lookups
from pipeline.retry import after_failure, of_newer_version
from pipeline.steps import kept_tokens
from runtime.clock import utc_now
from runtime.errors import LostFence, ServiceUnreachable, Transient
from runtime.logs import get_logger
from runtime.tracing import NOTHING, Value, span
from store.namespaces import count_unlooked
from store.shards import Claim, LoadedJobs, Retry
from store.steps import FinishedStep, steps_of, write_steps

log = get_logger(__name__)

NO_RETRIEVAL = "this worker has no way to documents: set STOKER_CACHE__CHROMA_URL for it, after `make documents`"
WAIT_S = 1.0  # between two questions to a Postgres that does not answer


class Lookups:
    """Looks shards up for one feed, and does the semantic cache's chores beside it."""

    def __init__(self, context: FeedContext) -> None:
        self._context = context
        self._chores: asyncio.Task[None] | None = None

    async def look_up(self, claimed: Claim, loaded: LoadedJobs) -> Looked:
        """What is known of the shard's jobs before they run."""
        jobs, later = _readable(loaded.jobs)
        if later:
            log.warning("jobs_of_newer_version", batch_id=str(claimed.batch_id), jobs=len(later), error=later[0].error)
        steps = await self._finished_steps(claimed, jobs)
        ready = await self._retrieve(claimed, jobs)
        with span("cache lookup") if self._context.cache is not None else NOTHING as seen:
            looked = await self._ask_caches(claimed, ready)
            if seen.is_recorded:
                seen.set(_told(ready, looked))
        count_lookups(looked)
        return replace(
            looked, results=[*later, *ready.results, *looked.results], retrieved=ready.retrieved, steps=steps
        )

    async def _retrieve(self, claimed: Claim, jobs: list[Job]) -> Looked:
        """The jobs that may run, with passages in the prompts of those that name a collection; and how others ended.

        Before the caches, since passages are part of what is asked.
        """
        wanting = [job for job in jobs if job.stoker and _wants_passages(job.stoker)]
        if not wanting or not claimed.runnable:
            return Looked(jobs=jobs)
        with span("retrieve", attributes={"stoker.jobs": len(wanting)}) as seen:
            found = await self._passages(claimed, wanting)
        retrieved, results = {}, []
        for job in wanting:
            one = found[job.seq]
            if isinstance(one, Transient):
                most = self._context.settings.limits.max_tries
                results.append(after_failure(job, one, max_tries=most, now=utc_now()))
            elif isinstance(one, JobResult):
                results.append(one)
            else:
                retrieved[job.seq] = one
        seen.set({"stoker.passages": sum(len(one.told) for one in retrieved.values())})
        return Looked(
            results=results,
            jobs=[
                replace(job, body=retrieved[job.seq].body) if job.seq in retrieved else job
                for job in jobs
                if job.seq in retrieved or job.seq not in found
            ],
            retrieved=retrieved,
        )

    async def _passages(
        self, claimed: Claim, wanting: Sequence[Job]
    ) -> Mapping[int, WithPassages | JobResult | Transient]:
        retrieval = self._context.retrieval
        if retrieval is None:
            return {job.seq: failed(job.seq, code="retrieval_unavailable", message=NO_RETRIEVAL) for job in wanting}
        try:
            return await retrieval.retrieve(claimed, wanting)
        except Exception as error:  # a defect of ours ends these jobs with a traceback in the log, and no shard
            log.exception("retrieval_defect", batch_id=str(claimed.batch_id))
            message = f"{type(error).__name__}: {error}"
            return {job.seq: failed(job.seq, code="internal_error", message=message) for job in wanting}

    async def _finished_steps(self, claimed: Claim, jobs: Sequence[Job]) -> dict[int, dict[str, str]]:
        """The finished steps of the jobs of several requests, by seq; without them all would be asked again."""
        seqs = [job.seq for job in jobs if job.stoker and read_settings(job.stoker).has_steps]
        while seqs and claimed.runnable:
            try:
                return await asyncio.to_thread(self._load_steps, claimed, seqs)
            except ServiceUnreachable as error:
                log.warning("steps_wait", error=str(error))
                if self._context.draining():
                    break
                await asyncio.sleep(WAIT_S)
        return {seq: {} for seq in seqs}

    def _load_steps(self, claimed: Claim, seqs: Sequence[int]) -> dict[int, dict[str, str]]:
        """What Postgres and Redis have; what only Redis has is written at once, since that may be emptied."""
        states = self._context.steps
        recent = {} if states is None else states.find(claimed.batch_id, seqs)
        with self._context.database.transaction() as session:
            stored = steps_of(session, claimed.batch_id, seqs)
            ahead = [
                FinishedStep(seq, step, reply, kept_tokens(reply, claimed.endpoint) if claimed.budgeted else 0)
                for seq, replies in recent.items()
                for step, reply in replies.items()
                if step not in stored.get(seq, {})
            ]
            lease_s = self._context.settings.worker.lease_s
            if ahead and claimed.budgeted and not charge_ahead(session, claimed, ahead, lease_s=lease_s):
                return {seq: stored.get(seq, {}) for seq in seqs}  # what is too dear now is as good as lost
            if ahead and not claimed.budgeted:
                # If the fence is lost, the next write finds out.
                write_steps(session, claimed, ahead, lease_s=lease_s)
        return {seq: recent.get(seq, {}) | stored.get(seq, {}) for seq in seqs}

    async def _ask_caches(self, claimed: Claim, ready: Looked) -> Looked:
        looked = Looked(jobs=ready.jobs)
        cache, semantic = self._context.cache, self._context.semantic
        if cache is None:
            return looked
        with self.never_stopping(claimed):
            looked = await asyncio.to_thread(self._look_up_exactly, cache, claimed, ready)
        if claimed.runs_alone:
            return looked
        if semantic is None:
            with self.never_stopping(claimed):
                await asyncio.to_thread(self._count_unlooked, claimed, looked)
            return looked
        with self.never_stopping(claimed):
            found = await semantic.look_up(claimed, looked)
            await asyncio.to_thread(cache.release, claimed, looked, found)
            looked = found
        self.begin_chores(claimed)
        return looked

    def _look_up_exactly(self, cache: ExactCache, claimed: Claim, ready: Looked) -> Looked:
        with self._context.database.transaction() as session:
            return cache.look_up(session, claimed, ready.jobs, ready.retrieved)

    def _count_unlooked(self, claimed: Claim, looked: Looked) -> None:
        lost = sum(looked.requests[job.seq].split is not None for job in looked.jobs if job.seq in looked.requests)
        if lost:
            with self._context.database.transaction() as session:
                count_unlooked(session, claimed, lost)

    @contextmanager
    def never_stopping(self, claimed: Claim) -> Iterator[None]:
        """A cache that fails in this block is none; the next write finds out which jobs are still ours."""
        try:
            yield
        except (ServiceUnreachable, LostFence) as error:
            log.warning("cache_failed", batch_id=str(claimed.batch_id), error=str(error))
        except Exception:  # a defect of the cache must not become one of the batch
            log.exception("cache_defect", batch_id=str(claimed.batch_id))

    def begin_chores(self, claimed: Claim) -> None:
        """Begin what the semantic cache has to do beside jobs, if there is some and none is under way."""
        semantic = self._context.semantic
        if semantic is not None and semantic.has_chores and (self._chores is None or self._chores.done()):
            self._chores = asyncio.get_running_loop().create_task(self._do_chores(claimed))

    async def _do_chores(self, claimed: Claim) -> None:
        semantic = self._context.semantic
        if semantic is not None:
            with self.never_stopping(claimed):
                await asyncio.to_thread(semantic.do_chores)

    async def finish(self) -> None:
        """Wait for the chores that are under way."""
        if self._chores is not None:
            await self._chores


def _readable(jobs: list[Job]) -> tuple[list[Job], list[Retry]]:
    """The jobs whose settings this version knows; what a newer one took in waits for a worker of it."""
    readable, later = [], []
    for job in jobs:
        try:
            if job.stoker:
                read_settings(job.stoker)
            readable.append(job)
        except UNREADABLE as error:
            later.append(of_newer_version(job, str(error), now=utc_now()))
    return readable, later


def _wants_passages(stoker: str) -> bool:
    """Whether its prompt is to have some; a conversation finds them turn by turn."""
    settings = read_settings(stoker)
    return settings.collection is not None and not settings.has_steps


def _told(asked: Looked, found: Looked) -> dict[str, Value]:
    """What a lookup's span states: how many jobs were looked up, and how many of them each cache answered."""
    sources = Counter(result.source for result in found.results if isinstance(result, JobResult))
    return {
        "stoker.jobs": len(asked.jobs),
        **{f"stoker.found.{source.value}": count for source, count in sources.items()},
        "stoker.missed": len(found.jobs),
    }
