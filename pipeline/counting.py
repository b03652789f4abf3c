"""What is counted of jobs once it is committed: for metrics, which may miss what a process that is killed did last.

It must not count before the commit, and what it asks Postgres for is asked only where somebody counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.jobs import JobResult
from models.states import Outcome, Source
from pipeline.cached import Looked
from runtime.metrics import JOBS, LOOKUPS, RETRIES, TOKENS, is_counting
from store.database import Session
from store.followers import count_followers
from store.shards import Claim


@dataclass(frozen=True, slots=True)
class Written:
    """What a transaction wrote: results, with how many jobs took each as theirs, and tries of jobs that go on."""

    results: Sequence[JobResult]
    followers: Mapping[int, int]
    retries: int


def followers_written(session: Session, claim: Claim, results: Sequence[JobResult]) -> Mapping[int, int]:
    """How many jobs took each of these results as theirs, by seq; in the transaction that writes them."""
    if not (results and claim.followers and is_counting()):
        return {}
    return count_followers(session, claim.batch_id, [result.seq for result in results])


def count_written(written: Sequence[Written]) -> None:
    """Count what is committed and will not be written again."""
    if not is_counting():
        return
    results = [result for one in written for result in one.results]
    jobs = Counter((result.outcome, result.source) for result in results)
    for one in written:
        for result in one.results:
            if (count := one.followers.get(result.seq)) is not None:
                jobs[result.outcome, Source.DUPLICATE] += count
    for (outcome, source), count in jobs.items():
        JOBS.add(count, outcome=outcome, source=source)
    TOKENS.add(sum(result.usage.prompt_tokens for result in results), kind="prompt")
    TOKENS.add(sum(result.usage.completion_tokens for result in results), kind="completion")
    TOKENS.add(sum(result.usage.cached_tokens for result in results), kind="cached")
    RETRIES.add(sum(one.retries for one in written))


def count_lookups(looked: Looked) -> None:
    """Count what was found of the jobs of a shard that caches were asked for; what is served semantically has left."""
    if not (looked.requests and is_counting()):
        return
    left = {job.seq for job in looked.jobs if job.seq in looked.requests}
    exact = sum(isinstance(result, JobResult) and result.source is Source.EXACT for result in looked.results)
    awaited = len(left & looked.awaited)
    found = {
        Source.EXACT: exact,
        Source.SEMANTIC: len(looked.requests) - exact - len(left),
        Source.DUPLICATE: awaited,
        Source.NONE: len(left) - awaited,
    }
    for source, jobs in found.items():
        LOOKUPS.add(jobs, found=source)


def count_ended(jobs: int) -> None:
    """Count jobs that ended without having run, their followers among them."""
    if jobs:
        JOBS.add(jobs, outcome=Outcome.FAILED, source=Source.NONE)
