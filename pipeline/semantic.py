"""The semantic cache as a worker child uses it: lookups of a shard's jobs, entries for what they answer, fits.

The rules are in cache/; rows in store/namespaces.py. A job is looked up once: what was decided is committed before
its answer is given or its request sent, and its second attempt finds that. Whatever of this is down, jobs run.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import numpy as np

from cache.certificate import coin
from cache.guards import Signature, signature
from cache.index import NOTHING, Emptied, Index, Near
from cache.keys import collection_name, namespace_key
from cache.model import FIT_SAMPLES, Model
from cache.namespace import Decided, Found, Judged, Query, adopt, decide, fit, is_fit_due, judge
from cache.payload import BLANK, Split
from cache.policy import Limits, Policy
from cache.score import NEIGHBOURS, Vectors, overlap, words
from models.jobs import Job
from models.names import request_name
from models.states import Outcome, Source
from pipeline.cached import Looked, Place, Request, served
from runtime.errors import LostFence, Permanent, ServiceUnreachable, Transient
from runtime.logs import get_logger
from runtime.metrics import JOBS
from runtime.settings import CacheSettings
from store.answers import answers_of, template_scope
from store.database import Database, Session
from store.followers import leaders_among
from store.namespaces import (
    IDLE_AT_ONCE,
    JudgedLookup,
    NewLookup,
    NewNamespace,
    OpenNamespace,
    Round,
    begin_fit,
    count_unlooked,
    delete_idle,
    end_fit,
    entry_count,
    find_answers_of,
    find_facts,
    find_namespaces,
    fit_entries,
    fit_samples,
    hold_namespace,
    lookups_of,
    model_of,
    open_namespaces,
    stocked,
    store_fit,
    store_policy,
    take_news,
    unsettled_answers,
    write_lookups,
)
from store.shards import Claim, hold_shard, write_results

log = get_logger(__name__)

ASKED_TWICE: Final = 200  # audited jobs by which a namespace's self-disagreement is known
FIT_ENTRIES: Final = 20_000  # the newest; 30 MB of vectors
FILL_ENTRIES: Final = 2_000  # of a page
INDEX_SLACK: Final = 0.2  # how far index and Postgres may be apart
FIT_LEASE_S: Final = 300.0
IDLE_EVERY_S: Final = 600.0  # between two looks for idle namespaces
MODELS_KEPT: Final = 64  # of a child, a few MB each
FACTS_KEPT: Final = 50_000  # entries whose payloads a child remembers, some 30 MB
LONGEST_TEMPLATE: Final = 2_000  # characters of it that are kept to be read

LEAST_NEIGHBOURS: Final = NEIGHBOURS // 2

_M = TypeVar("_M")


class Embedder(Protocol):
    """`id` names model and weights: vectors of different ids are never compared."""

    id: str

    async def __call__(self, texts: Sequence[str]) -> Vectors:
        """One vector of length 1 for each text, in order: float32, (texts, dimensions)."""
        ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What an entry is compared by, while it has this answer."""

    answer: str
    words: frozenset[str]
    signature: Signature


@dataclass(frozen=True, slots=True)
class _Asked:
    """A job of the shard that has a payload, and the key of its namespace."""

    job: Job
    request: Request
    split: Split
    key: bytes


class SemanticCache:
    """One child's hold on the semantic cache. Models and facts of entries are kept in its memory."""

    def __init__(
        self,
        database: Database,
        index: Index,
        embed: Embedder,
        *,
        settings: CacheSettings,
        engine_id: Callable[[], int | None],
        lease_s: float,
    ) -> None:
        self._database = database
        self._index = index
        self._embed = embed
        self._limits = Limits(settings.max_error, settings.max_served_error)
        self._engine_id = engine_id
        self._lease_s = lease_s
        self._idle_s = settings.ttl_s
        self._idle_at = time.monotonic()
        self._models: dict[int, tuple[int, Model]] = {}
        self._facts: OrderedDict[int, Facts] = OrderedDict()
        self._to_fit: dict[int, OpenNamespace] = {}
        self._to_refill: dict[int, OpenNamespace] = {}

    async def look_up(self, claim: Claim, looked: Looked) -> Looked:
        """Serve what is certain enough, and remember of the rest what would have been served.

        Results of served jobs are committed here, under the fence. What is down is counted as a miss. Raises
        LostFence, and ServiceUnreachable if Postgres is away: each namespace's decisions are committed or unmade.
        """
        asked = [one for job in looked.jobs if (one := self._asked(job, looked)) is not None]
        if not asked:
            return looked
        try:
            vectors = await self._embed([one.split.payload for one in asked])
        except (ServiceUnreachable, Transient, Permanent) as error:
            await asyncio.to_thread(self._miss, claim, len(asked), error)
            return looked
        return await asyncio.to_thread(self._look_up, claim, looked, asked, vectors)

    def add(self, entries: Sequence[tuple[Place, int]]) -> None:
        """Let lookups find what was kept; after the commit. What is missed here is made up for by a later fit.

        A namespace with too few entries to be asked has no collection; when they are enough, `do_chores` fills one.
        """
        groups = _grouped((place.namespace, (place, entry)) for place, entry in entries)
        with self._database.transaction() as session:
            asked = stocked(session, {namespace.id for namespace, _ in groups}, least=LEAST_NEIGHBOURS)
        for namespace, group in groups:
            if namespace.id not in asked:
                continue
            vectors = np.stack([np.frombuffer(place.vector, np.float32) for place, _ in group])
            try:
                self._index.add(collection_name(namespace.secret), [entry for _, entry in group], vectors)
            except Emptied:
                self._to_refill[namespace.id] = namespace
            except ServiceUnreachable as error:
                log.warning("cache_index_unreachable", error=str(error))

    @property
    def has_chores(self) -> bool:
        """Whether `do_chores` has something to do."""
        return bool(self._to_refill or self._to_fit) or time.monotonic() >= self._idle_at

    def do_chores(self) -> None:
        """Fit, fill the collections that are missing, drop those of idle namespaces: slow, apart from any shard."""
        while self._to_refill:
            self._refill(self._to_refill.popitem()[1])
        while self._to_fit:
            self._fit(self._to_fit.popitem()[1])
        if time.monotonic() >= self._idle_at:
            self._delete_idle()

    def _asked(self, job: Job, looked: Looked) -> _Asked | None:
        request = looked.requests.get(job.seq)
        if request is None or request.split is None:
            return None
        key = namespace_key(request.fields, request.scope, template=request.split.template, embedder=self._embed.id)
        return _Asked(job, request, request.split, key)

    def _miss(self, claim: Claim, lookups: int, error: Exception) -> None:
        log.warning("cache_lookups_missed", jobs=lookups, error=str(error))
        with self._database.transaction() as session:
            count_unlooked(session, claim, lookups)

    def _look_up(self, claim: Claim, looked: Looked, asked: list[_Asked], vectors: Vectors) -> Looked:
        seqs = [one.job.seq for one in asked]
        with self._database.transaction() as session:
            before = lookups_of(session, claim.batch_id, seqs)
            # A leader's answer is all its followers': it is worth a call, and one wrong answer would be many.
            leaders = leaders_among(session, claim.batch_id, seqs) if claim.followers else set()
            namespaces = self._opened(session, claim, asked)
            large = stocked(session, {one.id for one in namespaces.values()}, least=LEAST_NEIGHBOURS)
        places = {
            one.job.seq: Place(namespaces[one.key], one.split.payload, vector.astype(np.float32).tobytes())
            for one, vector in zip(asked, vectors, strict=True)
        }
        looked = replace(looked, places=places)
        to_decide = [one for one in asked if one.job.seq not in before and one.job.seq not in leaders]
        for namespace, group in _grouped((namespaces[one.key], one) for one in to_decide):
            try:
                found = [places[one.job.seq] for one in group]
                near = self._near(namespace, found) if namespace.id in large else [NOTHING] * len(group)
                looked = self._decide(claim, looked, namespace, group, near)
            except ServiceUnreachable as error:
                self._miss(claim, len(group), error)
        return looked

    def _opened(self, session: Session, claim: Claim, asked: Iterable[_Asked]) -> dict[bytes, OpenNamespace]:
        wanted = {one.key: one for one in asked}
        found = find_namespaces(session, claim.tenant, list(wanted))
        new = [self._new_namespace(one) for key, one in wanted.items() if key not in found]
        return found | (open_namespaces(session, claim.tenant, new) if new else {})

    def _new_namespace(self, one: _Asked) -> NewNamespace:
        return NewNamespace(
            key=one.key,
            endpoint=one.request.scope.endpoint,
            alias=str(one.request.fields.get("model")),
            checkpoint=one.request.scope.checkpoint,
            embedder=self._embed.id,
            template=one.split.template.replace(BLANK, "\u2026")[:LONGEST_TEMPLATE],
            scope=template_scope(one.split.template),
            secret=secrets.token_bytes(32),
            policy=Policy.begin(1, self._limits).encode(),
        )

    def _near(self, namespace: OpenNamespace, places: Sequence[Place]) -> list[Near]:
        vectors = np.stack([np.frombuffer(place.vector, np.float32) for place in places])
        try:
            return self._index.nearest(collection_name(namespace.secret), vectors, count=NEIGHBOURS)
        except Emptied:
            self._to_refill[namespace.id] = namespace
            return [NOTHING] * len(places)

    def _decide(
        self, claim: Claim, looked: Looked, namespace: OpenNamespace, group: list[_Asked], near: list[Near]
    ) -> Looked:
        """One transaction: what the engine has said since, the decisions, the results of those served."""
        facts = self._facts_of(namespace, {entry for one in near for entry in one.ids.tolist()})
        queries = [
            Query(
                coin(namespace.secret, request_name(claim.batch_id, one.job.seq).encode()),
                np.frombuffer(looked.places[one.job.seq].vector, np.float32),
                _found(one, found, facts),
            )
            for one, found in zip(group, near, strict=True)
        ]
        with self._database.transaction() as session:
            if not hold_shard(session, claim):
                raise LostFence
            held = hold_namespace(session, namespace.id)
            if held is None:  # cleared a moment ago: there is no place for these answers
                gone = {one.job.seq for one in group}
                return replace(looked, places={seq: p for seq, p in looked.places.items() if seq not in gone})
            news = take_news(session, namespace.id)
            before = _told(replace(Policy.decode(held.policy), limits=self._limits), news)
            unsettled = unsettled_answers(session, namespace.id, version=before.version)
            model = self._model(session, namespace, held.fit)
            after, decisions = decide(before, model, queries, unsettled=unsettled)
            made = [_Made(one, query.coin, d) for one, query, d in zip(group, queries, decisions, strict=True)]
            served_seqs, saved_tokens = self._serve(session, claim, namespace, made)
            unserved = [one for one in made if one.asked.job.seq not in served_seqs]
            rows = [one.row(namespace, before, served_beside=len(served_seqs)) for one in unserved]
            write_lookups(session, claim.batch_id, rows)
            audits = sum(one.decided.audited for one in made)
            added = Round(len(made), len(served_seqs), audits, saved_tokens)
            store_policy(session, namespace.id, after.encode(), made=added, news=news)
        # Nobody follows them: leaders are not decided.
        JOBS.add(len(served_seqs), outcome=Outcome.SUCCEEDED, source=Source.SEMANTIC)
        if is_fit_due(after):
            self._to_fit[namespace.id] = namespace
        return _left(looked, unserved, served_seqs, ask_twice=held.asked_twice < ASKED_TWICE)

    def _serve(
        self, session: Session, claim: Claim, namespace: OpenNamespace, made: Sequence[_Made]
    ) -> tuple[set[int], int]:
        """Write the results of those that are served: (their seqs, tokens saved). An entry just gone serves nobody."""
        wanted = {one.asked.job.seq: one.decided for one in made if one.decided.served}
        said = {one.entry: one.answer for one in wanted.values() if one.entry is not None and one.answer is not None}
        answers = answers_of(session, namespace.id, said)
        results = [
            served(seq, answers[one.entry], Source.SEMANTIC, namespace=namespace.id, similarity=one.similarity)
            for seq, one in wanted.items()
            if one.entry in answers
        ]
        if results:
            written = write_results(session, claim, results, engine_id=self._engine_id(), lease_s=self._lease_s)
            if written is None:
                raise LostFence
        saved = [answers[result.entry] for result in results if result.entry is not None]
        return {result.seq for result in results}, sum(one.prompt_tokens + one.completion_tokens for one in saved)

    def _facts_of(self, namespace: OpenNamespace, entries: set[int]) -> dict[int, Facts]:
        """What these entries are compared by, from memory where that still holds; those that are gone are missing."""
        if not entries:
            return {}
        with self._database.transaction() as session:
            answers = find_answers_of(session, namespace.id, list(entries))
            news = [e for e, answer in answers.items() if e not in self._facts or self._facts[e].answer != answer]
            rows = find_facts(session, namespace.id, news) if news else {}
        for entry, row in rows.items():
            self._facts[entry] = Facts(row.answer, words(row.payload), signature(row.payload))
        found = {entry: self._facts[entry] for entry in answers if entry in self._facts}
        for entry in found:
            self._facts.move_to_end(entry)
        while len(self._facts) > FACTS_KEPT:
            self._facts.popitem(last=False)
        return found

    def _model(self, session: Session, namespace: OpenNamespace, number: int) -> Model | None:
        if not number:
            return None
        known = self._models.get(namespace.id)
        if known is None or known[0] != number:
            stored = model_of(session, namespace.id)
            if stored is None:
                return None
            self._models[namespace.id] = known = (number, Model.from_bytes(stored))
            while len(self._models) > MODELS_KEPT:
                self._models.pop(next(iter(self._models)))
        return known[1]

    def _fit(self, namespace: OpenNamespace) -> None:
        with self._database.transaction() as session:
            text = begin_fit(session, namespace.id, lease_s=FIT_LEASE_S)
        if text is None:
            return
        policy = Policy.decode(text)
        with self._database.transaction() as session:
            rows = fit_samples(session, namespace.id, version=policy.version, limit=FIT_SAMPLES)
            entries = fit_entries(session, namespace.id, limit=FIT_ENTRIES)
        if not rows or not entries:
            with self._database.transaction() as session:
                end_fit(session, namespace.id)
            return
        vectors = np.stack([np.frombuffer(vector, np.float32) for _, _, vector in entries])
        model = fit(policy, [_judged(row) for row in rows], vectors, [answer for _, answer, _ in entries])
        with self._database.transaction() as session:
            held = hold_namespace(session, namespace.id)
            if held is not None:
                adopted = adopt(replace(Policy.decode(held.policy), limits=self._limits), model)
                store_fit(session, namespace.id, policy=adopted.encode(), model=model.to_bytes())
        log.info("cache_fitted", namespace=namespace.id, samples=len(rows), entries=len(entries))
        self._refill(namespace)

    def _refill(self, namespace: OpenNamespace) -> None:
        """Make the index hold what Postgres does, if they are apart: it was emptied, was away, or entries expired."""
        name = collection_name(namespace.secret)
        with self._database.transaction() as session:
            if not stocked(session, [namespace.id], least=LEAST_NEIGHBOURS):
                return  # cleared meanwhile: nobody would drop the collection again
            count = entry_count(session, namespace.id)
        try:
            try:
                size = self._index.size(name)
            except Emptied:
                size = 0
            if size > count * (1 + INDEX_SLACK) + NEIGHBOURS:
                self._index.drop(name)
                size = 0
            if size < count * (1 - INDEX_SLACK) or not size:
                self._fill(namespace)
        except ServiceUnreachable as error:
            log.warning("cache_index_unreachable", error=str(error))

    def _fill(self, namespace: OpenNamespace) -> None:
        name, below = collection_name(namespace.secret), None
        self._index.make(name)
        while True:
            with self._database.transaction() as session:
                entries = fit_entries(session, namespace.id, limit=FILL_ENTRIES, below=below)
            if not entries:
                return
            vectors = np.stack([np.frombuffer(vector, np.float32) for _, _, vector in entries])
            self._index.add(name, [entry for entry, _, _ in entries], vectors)
            below = entries[-1][0]

    def _delete_idle(self) -> None:
        """Delete some idle namespaces, and their collections before that is committed: no collection is left alone."""
        self._idle_at = time.monotonic() + IDLE_EVERY_S
        try:
            with self._database.transaction() as session:
                gone = delete_idle(session, idle_s=self._idle_s)
                for secret in gone:
                    self._index.drop(collection_name(secret))
        except ServiceUnreachable as error:
            log.warning("idle_namespaces_stay", error=str(error))
            return
        if len(gone) == IDLE_AT_ONCE:
            self._idle_at = time.monotonic()  # there are more: the next chores go on


@dataclass(frozen=True, slots=True)
class _Made:
    """A decision about a job."""

    asked: _Asked
    coin: float
    decided: Decided

    def row(self, namespace: OpenNamespace, before: Policy, *, served_beside: int) -> NewLookup:
        """To be kept; `before` is the policy before its shard, of which so many were served."""
        decided = self.decided
        return NewLookup(
            seq=self.asked.job.seq,
            namespace_id=namespace.id,
            version=before.version,
            place=before.lookups,
            decided=before.decided,
            served_beside=served_beside,
            coin=self.coin,
            rate=decided.rate,
            wished=decided.wished,
            in_shadow=decided.in_shadow,
            audited=decided.audited,
            answer=decided.answer,
            features=np.array(decided.features, np.float32).tobytes() if decided.features else None,
        )


def _left(looked: Looked, unserved: Sequence[_Made], served_seqs: set[int], *, ask_twice: bool) -> Looked:
    """What is still to run: audits first, since the policy waits for what they show."""
    audited = {one.asked.job.seq for one in unserved if one.decided.audited}
    jobs = [job for job in looked.jobs if job.seq not in served_seqs]
    jobs.sort(key=lambda job: (job.seq in looked.awaited, job.seq not in audited))
    drawn = {one.asked.job.seq for one in unserved if one.coin < one.decided.rate} if ask_twice else set()
    return replace(looked, jobs=jobs, twice=looked.twice | drawn)


def _found(one: _Asked, near: Near, facts: Mapping[int, Facts]) -> Found | None:
    """The neighbours that are still there; None if there are too few to judge by."""
    there = [at for at, entry in enumerate(near.ids.tolist()) if entry in facts]
    if len(there) < LEAST_NEIGHBOURS:
        return None
    entries = near.ids[there]
    own_words, own_signature = words(one.split.payload), signature(one.split.payload)
    known = [facts[entry] for entry in entries.tolist()]
    return Found(
        entries=entries,
        answers=[fact.answer for fact in known],
        cosines=near.cosines[there],
        overlaps=np.array([overlap(own_words, fact.words) for fact in known]),
        allowed=np.array([fact.signature == own_signature for fact in known]),
        word_count=len(own_words),
    )


def _told(policy: Policy, news: Sequence[JudgedLookup]) -> Policy:
    """The policy after what was judged of its version. An audit without an answer is an error; no alarm hears of it."""
    mine = [one for one in news if one.version == policy.version]
    audit = policy.audit
    for one in mine:
        if one.audited and one.agreed is None:
            audit = audit.with_errors(1, one.rate)
    return judge(
        replace(policy, audit=audit), [_judged(one) for one in mine if one.features and one.agreed is not None]
    )


def _judged(row: JudgedLookup) -> Judged:
    features = tuple(np.frombuffer(row.features or b"", np.float32).tolist())
    return Judged(features, bool(row.agreed), row.wished, row.audited, row.in_shadow, row.coin, row.rate)


def _grouped(pairs: Iterable[tuple[OpenNamespace, _M]]) -> list[tuple[OpenNamespace, list[_M]]]:
    groups: dict[OpenNamespace, list[_M]] = {}
    for group, member in pairs:
        groups.setdefault(group, []).append(member)
    return list(groups.items())
