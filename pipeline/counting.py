"""What is counted of jobs once it is committed: for metrics, which may miss what a process that is killed did last.

It must not count before the commit, and what it asks Postgres for is asked only where somebody counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from models.jobs import JobResult
from models.states import Outcome, Source
from pipeline.cached import Looked
from runtime.metrics import JOBS, LOOKUPS, RETRIES, TOKENS, is_counting
from store.database import Session
from store.followers import count_followers
from store.shards import Claim


def followers_written(session: Session, claim: Claim, results: Sequence[JobResult]) -> Mapping[int, int]:
    """How many jobs took each of these results as theirs, by seq; for `count_written`, in the transaction before it."""
    if not (results and claim.followers and is_counting()):
        return {}
    return count_followers(session, claim.batch_id, [result.seq for result in results])


def count_written(results: Sequence[JobResult], *, retries: int = 0, followers: Mapping[int, int]) -> None:
    """Count results that are committed, with those of their followers, and failed tries of jobs that go on."""
    if not is_counting():
        return
    jobs = Counter((result.outcome, result.source) for result in results)
    for result in results:
        if (count := followers.get(result.seq)) is not None:
            jobs[result.outcome, Source.DUPLICATE] += count
    for (outcome, source), count in jobs.items():
        JOBS.add(count, outcome=outcome, source=source)
    TOKENS.add(sum(result.usage.prompt_tokens for result in results), kind="prompt")
    TOKENS.add(sum(result.usage.completion_tokens for result in results), kind="completion")
    TOKENS.add(sum(result.usage.cached_tokens for result in results), kind="cached")
    RETRIES.add(retries)


def count_lookups(looked: Looked) -> None:
    """Count what was found of the jobs of a shard that caches were asked for; what is served semantically has left."""
    if not looked.requests:
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
