"""The exact cache as a worker child uses it: one call for a whole shard before it runs, one beside each write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cache.answers import answer_text
from cache.keys import EMBEDDINGS, Scope, asks_for_one, exact_key, is_deterministic, read_body
from models.jobs import CachedAnswer, Job, JobResult
from models.states import CacheMode, Outcome, Source
from runtime.settings import CacheSettings
from store.answers import NewAnswer, epoch_of, find_answers, keep_answers
from store.database import Session
from store.engines import checkpoint_of
from store.recent import RecentAnswers
from store.shards import Claim


@dataclass(slots=True)
class Looked:
    """What looking a shard up gave: results for some jobs, the jobs that are to run, the keys of all that have one."""

    results: list[JobResult] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    keys: dict[int, bytes] = field(default_factory=dict)


class ExactCache:
    """Answers that one checkpoint gave to one request of one tenant.

    Redis is asked first and may be gone; Postgres is the truth. It finds nothing before the engine is known.
    """

    def __init__(self, recent: RecentAnswers, settings: CacheSettings, *, engine_id: Callable[[], int | None]) -> None:
        self._recent = recent
        self._settings = settings
        self._engine_id = engine_id
        self._checkpoints: dict[int, str] = {}

    def look_up(self, session: Session, claim: Claim, jobs: Sequence[Job]) -> Looked:
        """Find answers for the jobs of a claimed shard; in the claim's transaction, which it does not change."""
        scope = self._scope(session, claim)
        if claim.cache is CacheMode.OFF or not claim.runnable or scope is None:
            return Looked(jobs=list(jobs))
        keys = {job.seq: key for job in jobs if (key := self._key(job, scope)) is not None}
        wanted = list(dict.fromkeys(keys.values()))
        found = self._recent.find(wanted)
        if missing := [key for key in wanted if key not in found]:
            stored = find_answers(session, claim.tenant, missing)
            self._recent.keep(stored)
            found |= stored
        looked = Looked(keys=keys)
        for job in jobs:
            answer = found.get(keys.get(job.seq, b""))
            if answer is None:
                looked.jobs.append(job)
            else:
                looked.results.append(_served(job.seq, answer))
        return looked

    def keep(
        self, session: Session, claim: Claim, keys: dict[int, bytes], results: Sequence[JobResult]
    ) -> dict[bytes, CachedAnswer]:
        """Keep what the engine answered, in the transaction of its results; give `published` what this returns."""
        new = {
            keys[result.seq]: NewAnswer(
                key=keys[result.seq],
                seq=result.seq,
                response=result.response or "",
                status_code=result.status_code or 200,
                prompt_tokens=result.usage.prompt_tokens,
                completion_tokens=result.usage.completion_tokens,
            )
            for result in results
            if result.seq in keys and _may_be_kept(result, endpoint=claim.endpoint)
        }
        if not new:
            return {}
        return dict(keep_answers(session, claim.tenant, claim.batch_id, list(new.values()), ttl_s=self._settings.ttl_s))

    def publish(self, answers: dict[bytes, CachedAnswer]) -> None:
        """Let other workers find them quickly; after the commit."""
        self._recent.keep(answers)

    def close(self) -> None:
        """Close the connections."""
        self._recent.close()

    def _scope(self, session: Session, claim: Claim) -> Scope | None:
        engine_id = self._engine_id()
        if engine_id is None:
            return None
        if engine_id not in self._checkpoints:
            self._checkpoints[engine_id] = checkpoint_of(session, engine_id)
        epoch = epoch_of(session, claim.tenant)
        return Scope(claim.tenant, claim.endpoint, self._checkpoints[engine_id], epoch)

    def _key(self, job: Job, scope: Scope) -> bytes | None:
        try:
            fields = read_body(job.body)
        except ValueError:  # msgspec refuses what Python's json wrote, such as a lone surrogate: then it is not cached
            return None
        fits = is_deterministic(fields, endpoint=scope.endpoint) or self._settings.sampled
        return exact_key(fields, scope) if fits and asks_for_one(fields) else None


def _served(seq: int, answer: CachedAnswer) -> JobResult:
    return JobResult(
        seq=seq,
        outcome=Outcome.SUCCEEDED,
        source=Source.EXACT,
        status_code=answer.status_code,
        response=answer.response,
        entry=answer.entry,
    )


def _may_be_kept(result: JobResult, *, endpoint: str) -> bool:
    """Whole answers of the engine only: never a tool call, a refusal, or one that was cut."""
    if result.outcome is not Outcome.SUCCEEDED or result.source is not Source.ENGINE or result.response is None:
        return False
    return endpoint == EMBEDDINGS or answer_text(result.response) is not None
