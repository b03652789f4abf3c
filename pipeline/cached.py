"""The exact cache as a worker child uses it: one call for a whole shard before it runs, one beside each write.

Before: answers that one checkpoint gave to one request of one tenant, and which jobs run elsewhere at this moment.
After: what the engine answered is kept, and what the semantic cache asked of it is judged (pipeline/semantic.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cache.answers import answer_text, comparable, comparison
from cache.keys import EMBEDDINGS, Scope, asks_for_one, exact_key, is_deterministic, read_body
from cache.payload import LONGEST_BARE, Affixes, Split, prompt_of, split, split_declared
from models.jobs import CachedAnswer, Job, JobResult
from models.line_settings import LineSettings, cache_mode_of, read_settings
from models.names import request_name
from models.states import CacheMode, Outcome, Source
from runtime.errors import Transient
from runtime.settings import CacheSettings, without_secrets
from store.answers import (
    TENANT_SCOPE,
    NewAnswer,
    add_sources,
    checkpoint_scope,
    epochs_of,
    find_answers,
    keep_answers,
    living,
    template_scope,
)
from store.database import Session
from store.engines import adapters_of, checkpoint_of
from store.followers import settings_of_followers
from store.namespaces import OpenNamespace, Verdict, judge_lookups
from store.recent import RecentAnswers
from store.shards import Claim, Retry

_NO_SETTINGS = LineSettings()


@dataclass(frozen=True, slots=True)
class Request:
    """A job's request as the caches read it; `split` is its payload in its template, if it may be served semantically.

    `sources` are the documents that its line says its prompt was made from. `by_engine`: its worker's own engine serves
    its model, so what another endpoint answers is not kept.
    """

    fields: Mapping[str, Any]
    scope: Scope
    key: bytes
    split: Split | None
    sources: tuple[str, ...]
    by_engine: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job's answer goes in the semantic cache: its payload and that one's vector, float32."""

    namespace: OpenNamespace
    payload: str
    vector: bytes


@dataclass(frozen=True, slots=True)
class Looked:
    """What looking a shard up gave: results for some jobs, the jobs that are to run, and what is known of these.

    `awaited` jobs equal one that runs at this moment. `twice` are asked twice. `steps` has the jobs of several
    requests, each with the replies that it has had, by step; `retrieved` those that have passages in their prompts. All
    by seq. `engine_id` is the engine whose checkpoint is in the requests' keys.
    """

    results: list[JobResult | Retry] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    requests: dict[int, Request] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)
    awaited: frozenset[int] = frozenset()
    twice: frozenset[int] = frozenset()
    steps: dict[int, dict[str, str]] = field(default_factory=dict)
    retrieved: Mapping[int, WithPassages] = field(default_factory=dict)
    engine_id: int | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What a transaction kept, to be told after its commit."""

    answers: dict[bytes, CachedAnswer]
    ended: list[tuple[bytes, str]]
    entries: list[tuple[Place, int]]


class WithPassages(Protocol):
    """A job's prompt with passages of documents in it."""

    @property
    def body(self) -> str: ...
    @property
    def digests(self) -> tuple[str, ...]:
        """Of the passages, in their order."""
        ...

    @property
    def told(self) -> Sequence[Mapping[str, Any]]:
        """What a result says of each."""
        ...

    def tell(self, result: JobResult) -> JobResult:
        """The job's result with what it was told of the passages."""
        ...


class Retrieval(Protocol):
    """Passages for jobs, as feeding sees it; pipeline/retrieval.py needs libraries that a worker may lack."""

    async def retrieve(
        self, claim: Claim, jobs: Sequence[Job]
    ) -> Mapping[int, WithPassages | JobResult | Transient]: ...


class Semantic(Protocol):
    """The semantic cache as feeding sees it; pipeline/semantic.py needs libraries that a worker may lack."""

    async def look_up(self, claim: Claim, looked: Looked) -> Looked: ...

    def add(self, entries: Sequence[tuple[Place, int]]) -> None: ...

    @property
    def has_chores(self) -> bool: ...

    def do_chores(self) -> None: ...


class ExactCache:
    """Redis is asked first and may be gone; Postgres is the truth. It finds nothing before the engine is known.

    `embeddings_url`: embeddings come from there, not from the engine. `registered`: what decides the answers for a
    model that registered endpoints alone serve; None for the others.
    """

    def __init__(
        self,
        recent: RecentAnswers,
        settings: CacheSettings,
        *,
        engine_id: Callable[[], int | None],
        embeddings_url: str | None = None,
        registered: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self._registered = registered
        self._recent = recent
        self._settings = settings
        self._engine_id = engine_id
        self._embeddings_url = None if embeddings_url is None else without_secrets(embeddings_url)
        self._checkpoints: dict[int, str] = {}
        self._adapters: dict[int, dict[str, str]] = {}

    def look_up(
        self, session: Session, claim: Claim, jobs: Sequence[Job], retrieved: Mapping[int, WithPassages]
    ) -> Looked:
        """Find answers for the jobs of a claimed shard.

        Jobs that run elsewhere go last: by their turn there may be an answer.
        """
        passages = {seq: found.digests for seq, found in retrieved.items()}
        requests = self._requests(session, claim, jobs, passages)
        wanted = list(dict.fromkeys(request.key for request in requests.values()))
        found = self._recently(session, claim.tenant, wanted)
        if missing := [key for key in wanted if key not in found]:
            stored = find_answers(session, claim.tenant, missing)
            self._recent.keep(stored)
            found |= stored
        results: list[JobResult | Retry] = []
        left = []
        for job in jobs:
            request = requests.get(job.seq)
            answer = None if request is None else found.get(request.key)
            if answer is None:
                left.append(job)
            else:
                results.append(served(job.seq, answer, Source.EXACT))
        awaited = self._awaited(claim, left, requests)
        left.sort(key=lambda job: job.seq in awaited)
        return Looked(results, left, requests, awaited=awaited, engine_id=self._engine_id())

    def ask_again(self, session: Session, claim: Claim, job: Job, request: Request) -> JobResult | None:
        """The answer that a job has waited for, if it has come."""
        answer = self._recently(session, claim.tenant, [request.key]).get(request.key)
        if answer is None:
            answer = find_answers(session, claim.tenant, [request.key]).get(request.key)
        return None if answer is None else served(job.seq, answer, Source.EXACT)

    def is_awaited(self, claim: Claim, job: Job, request: Request) -> bool:
        """Whether an equal job still runs elsewhere; if not, this one is the one that runs now.

        Ask for its answer afterwards: the other's is there before that one has ended.
        """
        return bool(self._recent.begin({request.key: request_name(claim.batch_id, job.seq)}))

    def keep(
        self, session: Session, claim: Claim, looked: Looked, results: Sequence[JobResult], repeated: Mapping[int, bool]
    ) -> Kept:
        """Keep what the engine answered, in the transaction of its results; give `publish` what this returns."""
        ended = _runners(claim, [result.seq for result in results], looked.requests)
        if not ended:
            return Kept({}, [], [])
        compared = {
            result.seq: comparison(result.response or "") if _is_whole(result) and _of_engine(result) else None
            for result in results
            if result.seq in looked.requests and looked.requests[result.seq].split is not None
        }
        if compared:
            by_checkpoint: dict[str | None, list[Verdict]] = {}
            for result in results:
                if result.seq in compared:
                    judged = by_checkpoint.setdefault(self._answered_by(looked, result), [])
                    judged.append(_verdict(result, compared, repeated))
            for checkpoint, verdicts in by_checkpoint.items():
                judge_lookups(session, claim.batch_id, verdicts, checkpoint=checkpoint)
        served_by = {r.entry: looked.requests[r.seq].sources for r in results if r.seq in looked.requests and r.entry}
        add_sources(session, claim.tenant, served_by)
        new = {}
        if looked.engine_id == self._engine_id():  # else another checkpoint has answered than the key says
            for result in results:
                if result.seq in looked.requests and _may_be_kept(result, endpoint=claim.endpoint):
                    request, place = looked.requests[result.seq], looked.places.get(result.seq)
                    if request.by_engine is not _of_engine(result):
                        continue
                    new[request.key] = self._new(result, request, place, compared.get(result.seq))
        kept = keep_answers(session, claim.tenant, claim.batch_id, list(new.values())) if new else {}
        entries = [
            (looked.places[one.seq], kept[key].entry)
            for key, one in new.items()
            if key in kept and one.answer is not None and one.seq in looked.places
        ]
        return Kept(kept, ended, entries)

    def publish(self, kept: Kept) -> None:
        """Let other workers find answers quickly, and those that wait go on; after the commit."""
        self._recent.keep(kept.answers)
        self._recent.end(kept.ended)

    def release(self, claim: Claim, before: Looked, after: Looked) -> None:
        """Jobs that were to run and have been served meanwhile: whoever waits for them need not."""
        left = {job.seq for job in after.jobs}
        self._recent.end(_runners(claim, [job.seq for job in before.jobs if job.seq not in left], before.requests))

    def close(self) -> None:
        """Close the connections."""
        self._recent.close()

    def _recently(self, session: Session, tenant: str, keys: Sequence[bytes]) -> dict[bytes, CachedAnswer]:
        """What Redis has, where Postgres has it still: what was cleared a moment ago may have come back there."""
        found = self._recent.find(keys)
        alive = living(session, tenant, {key: answer.entry for key, answer in found.items()}) if found else set()
        return {key: answer for key, answer in found.items() if key in alive}

    def _new(self, result: JobResult, request: Request, place: Place | None, compared: str | None) -> NewAnswer:
        own_ttl = None if place is None else place.namespace.ttl_s
        return NewAnswer(
            key=request.key,
            seq=result.seq,
            response=result.response or "",
            status_code=result.status_code or 200,
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=result.usage.completion_tokens,
            ttl_s=own_ttl or self._settings.ttl_s,
            namespace_id=None if place is None else place.namespace.id,
            payload=None if place is None else place.payload,
            answer=compared,
            vector=None if place is None or compared is None else place.vector,
            sources=request.sources,
        )

    def _awaited(self, claim: Claim, jobs: Sequence[Job], requests: Mapping[int, Request]) -> frozenset[int]:
        """Jobs that equal one which runs elsewhere, or one before them in this shard."""
        if claim.runs_alone or claim.endpoint == EMBEDDINGS:
            return frozenset()
        first: dict[bytes, int] = {}
        for job in jobs:
            if job.seq in requests:
                first.setdefault(requests[job.seq].key, job.seq)
        elsewhere = self._recent.begin({key: request_name(claim.batch_id, seq) for key, seq in first.items()})
        return frozenset(
            job.seq
            for job in jobs
            if job.seq in requests and (requests[job.seq].key in elsewhere or first[requests[job.seq].key] != job.seq)
        )

    def _requests(
        self, session: Session, claim: Claim, jobs: Sequence[Job], passages: Mapping[int, Sequence[str]]
    ) -> dict[int, Request]:
        if not claim.runnable:
            return {}
        read = [one for job in jobs if (one := self._read(session, claim, job)) is not None]
        templates = sorted({template_scope(one.split.template) for one in read if one.split is not None})
        checkpoints = sorted({checkpoint_scope(one.checkpoint) for one in read})
        scopes = [TENANT_SCOPE, *checkpoints, *templates]
        epochs = dict(zip(scopes, epochs_of(session, claim.tenant, scopes), strict=True)) if read else {}
        named = settings_of_followers(session, claim.batch_id, [one.seq for one in read]) if claim.followers else {}
        made = {}
        for one in read:
            raised: tuple[int, ...] = (epochs[TENANT_SCOPE], epochs[checkpoint_scope(one.checkpoint)])
            if one.split is not None and (epoch := epochs[template_scope(one.split.template)]):
                raised = (*raised, epoch)
            scope = Scope(claim.tenant, claim.endpoint, one.checkpoint, raised, validated=claim.validates)
            sources = (
                *one.sources,
                *(name for line in named.get(one.seq, ()) for name in read_settings(line).sources or ()),
            )
            with suppress(RecursionError):  # a body nested so deep has no key, and is not cached
                key = exact_key(one.fields, scope, passages=passages.get(one.seq, ()))
                made[one.seq] = Request(one.fields, scope, key, one.split, sources, one.by_engine)
        return made

    def _checkpoint(self, session: Session, endpoint: str, model: str) -> str | None:
        """What of the engine answers: its checkpoint, with an adapter's, or the server that embeddings come from."""
        engine_id = self._engine_id()
        if engine_id is None:
            return None
        if engine_id not in self._checkpoints:
            self._checkpoints[engine_id] = checkpoint_of(session, engine_id)
            self._adapters[engine_id] = adapters_of(session, engine_id)
        if endpoint == EMBEDDINGS and self._embeddings_url is not None:
            return self._embeddings_url
        adapter = self._adapters[engine_id].get(model)
        return self._checkpoints[engine_id] + ("" if adapter is None else f"+{adapter}")

    def _answered_by(self, looked: Looked, result: JobResult) -> str | None:
        """The checkpoint of the key that answered a job; None if another endpoint did, or the engine has changed."""
        is_same = looked.engine_id is not None and looked.engine_id == self._engine_id() and _of_engine(result)
        return looked.requests[result.seq].scope.checkpoint if is_same else None

    def _read(self, session: Session, claim: Claim, job: Job) -> _Read | None:
        line = read_settings(job.stoker) if job.stoker else _NO_SETTINGS
        mode = cache_mode_of(line, claim.cache)
        if mode is CacheMode.OFF or line.has_steps:
            return None
        try:
            fields = read_body(job.body)
        except (ValueError, RecursionError):  # such as a lone surrogate, which Python's json wrote: it is not cached
            return None
        fits = is_deterministic(fields, endpoint=claim.endpoint) or self._settings.sampled
        if not (fits and asks_for_one(fields)):
            return None
        model = str(fields.get("model"))
        registered = self._registered(model)
        checkpoint = registered or self._checkpoint(session, claim.endpoint, model)
        if checkpoint is None:
            return None
        is_similar = mode is CacheMode.SEMANTIC and not line.stands_alone and registered is None
        place = _split(fields, line, claim.affixes) if is_similar else None
        return _Read(job.seq, fields, place, tuple(line.sources or ()), checkpoint, by_engine=registered is None)


@dataclass(frozen=True, slots=True)
class _Read:
    seq: int
    fields: Mapping[str, Any]
    split: Split | None
    sources: tuple[str, ...]
    checkpoint: str
    by_engine: bool


def served(
    seq: int, answer: CachedAnswer, source: Source, *, namespace: int | None = None, similarity: float | None = None
) -> JobResult:
    """The result of a job that an earlier answer serves: no tokens are spent."""
    return JobResult(
        seq=seq,
        outcome=Outcome.SUCCEEDED,
        source=source,
        status_code=answer.status_code,
        response=answer.response,
        entry=answer.entry,
        namespace=namespace,
        similarity=similarity,
    )


def says_the_same(one: JobResult, other: JobResult) -> bool:
    """Whether two results of one request hold the same answer, as answers are compared; free text by its letters."""
    texts = [answer_text(result.response or "") for result in (one, other)]
    return texts[0] is not None and texts[1] is not None and comparable(texts[0]) == comparable(texts[1])


def _runners(claim: Claim, seqs: Iterable[int], requests: Mapping[int, Request]) -> list[tuple[bytes, str]]:
    """The keys of those of these jobs that have one, each with its job's name; equal jobs have one key."""
    return [(requests[seq].key, request_name(claim.batch_id, seq)) for seq in seqs if seq in requests]


def _split(fields: Mapping[str, Any], line: LineSettings, affixes: Affixes) -> Split | None:
    """The request's payload in its template: the line's own, or else what stands between the batch's affixes.

    None too for what Postgres would not store, a NUL or a lone surrogate, and for a payload that the embedder would
    cut: two that begin alike would have one vector.
    """
    prompt = prompt_of(fields)
    if prompt is None:
        return None
    before, text = prompt
    if "\0" in text or text.encode(errors="ignore").decode() != text:
        return None
    found = split(text, affixes) if line.template is None else split_declared(line.template, line.variables or {})
    if found is None or len(found.payload.encode()) > LONGEST_BARE:
        return None
    return replace(found, template=before + found.template)


def _verdict(result: JobResult, compared: Mapping[int, str | None], repeated: Mapping[int, bool]) -> Verdict:
    """What the engine said of a job, now or, where an equal request served it, before."""
    tokens, twice = result.usage.prompt_tokens + result.usage.completion_tokens, result.seq in repeated
    return Verdict(result.seq, compared[result.seq], repeated.get(result.seq), tokens * (2 if twice else 1))


def _of_engine(result: JobResult) -> bool:
    """Whether it came from the worker's own engine, not from an endpoint beside it."""
    return result.engine_id is None


def _is_whole(result: JobResult) -> bool:
    return result.outcome is Outcome.SUCCEEDED and result.response is not None


def _may_be_kept(result: JobResult, *, endpoint: str) -> bool:
    """Whole answers of the engine only: never a tool call, a refusal, or one that was cut."""
    if not _is_whole(result) or result.source is not Source.ENGINE:
        return False
    return endpoint == EMBEDDINGS or answer_text(result.response or "") is not None
