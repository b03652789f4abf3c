"""The one place that decides whether a job that failed transiently is tried again, and when."""

from __future__ import annotations

import random
from datetime import datetime, timedelta

from models.jobs import Job, JobResult, failed
from models.states import Source
from runtime.errors import Transient
from store.shards import Retry

BASE_S = 1.0
CAP_S = 60.0
WAIT_FOR_EQUAL_S = 2.0
WAIT_FOR_UPDATE_S = 10.0
RETRY_AFTER_CAP_S = 900.0  # a longer wish is a mistake, such as an epoch


def after_failure(job: Job, error: Transient, *, max_tries: int, now: datetime) -> Retry | JobResult:
    """A later try by exponential backoff with full jitter, or the job's end when its tries are spent.

    Full jitter (Brooker, "Exponential Backoff And Jitter", 2015): uniform over [0, min(cap, base * 2^tries)];
    the server's Retry-After is the least wait.
    """
    tries = job.tries + 1
    if tries >= max_tries:
        return failed(
            job.seq,
            code="retries_exhausted",
            source=Source.ENGINE,
            message=f"failed {tries} times, the last time with: {error}",
        )
    wait_s = random.uniform(0, min(CAP_S, BASE_S * 2**tries))  # noqa: S311  # jitter, not a secret
    wait_s = max(wait_s, min(error.retry_after_s or 0.0, RETRY_AFTER_CAP_S))
    return Retry(job.seq, tries, job.engine_deaths, not_before=now + timedelta(seconds=wait_s), error=str(error)[:500])


def after_engine_death(job: Job, error: Transient, *, now: datetime) -> Retry:
    """A later try that counts against the engine's deaths under this job, not against its tries."""
    return Retry(
        job.seq,
        job.tries,
        job.engine_deaths + 1,
        not_before=now + timedelta(seconds=BASE_S),
        error=f"the engine died under it: {error}"[:500],
    )


def waiting(job: Job, *, now: datetime) -> Retry:
    """A look later at whether an equal job, which runs elsewhere, has its answer; no try is counted."""
    return Retry(
        job.seq,
        job.tries,
        job.engine_deaths,
        not_before=now + timedelta(seconds=WAIT_FOR_EQUAL_S),
        error="waits for an equal job that runs elsewhere",
    )


def of_newer_version(job: Job, unknown: str, *, now: datetime) -> Retry:
    """A look later, by a worker that knows the job's settings; no try is counted."""
    return Retry(
        job.seq,
        job.tries,
        job.engine_deaths,
        not_before=now + timedelta(seconds=WAIT_FOR_UPDATE_S),
        error=f"waits for a worker of the version that took it in: {unknown}"[:500],
    )
