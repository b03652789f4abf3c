"""Submit: validate a batch file while it streams into Postgres, all of it or nothing.

The batch is `validating` and invisible to dispatch until its last transaction. It must not hold the file
in memory, nor leave rows of a file that was refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

import msgspec

from models.lines import LineRules, ParsedLine, SubmitOptions
from models.states import CacheMode, JobOrder, Priority
from pipeline.again import check_reusable
from pipeline.arrange import PAGE_SHARDS, arrange
from pipeline.batch_file import PROGRESS_EVERY_LINES, BatchFile, Progress, SkippingBatchFile, opened
from pipeline.begin import CHUNK_JOBS, LEASE, TENANT, begin_batch, same_submit
from pipeline.begin import Submitted as Submitted
from pipeline.cutting import ShardCutter, cut_ordered
from pipeline.duplicates import LOW_BITS, DigestBuckets
from pipeline.prefixes import WINDOW_JOBS, PrefixTree
from pipeline.semantic_lines import SemanticLines
from pipeline.serving import ServedModels
from runtime.clock import uuid7
from runtime.errors import InvalidFile, Problem
from runtime.settings import Settings, ShardSettings
from store.budgets import open_batch_budget
from store.database import Database
from store.money import open_batch_money
from store.submissions import Filled, NewBatch, copy_jobs, digest_of_key, extend_lease, insert_shards, set_going

CHUNK_BYTES = 256 * 1024 * 1024
ORDERED = "prompts that begin alike run together, not in the file's order; results are in it, and --order file keeps it"


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a batch is to run among others, and whose results it may take over."""

    priority: Priority = Priority.NORMAL
    weight: float = 1.0  # its share among its tenant's batches
    results_of: UUID | None = None  # lines that equal a job of this batch take its succeeded result
    order: JobOrder = JobOrder.PREFIX
    budget_tokens: int | None = None  # the most that all its jobs may take
    budget_nanos: int | None = None  # the most that priced endpoints may ask for them


NO_WISHES = Wishes()
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FileEstimate:
    """What a file would become. Tokens are estimates: the bodies' bytes / 4, and the most to generate."""

    lines: int
    prompt_tokens: int
    output_tokens: int
    models: dict[str, int]
    endpoint: str
    skipped: int = 0
    notices: tuple[str, ...] = ()


def submit_file(
    database: Database,
    path: Path,
    *,
    options: SubmitOptions,
    settings: Settings,
    served_models: ServedModels | None,
    reuse: bool,
    on_progress: Progress | None = None,
    on_skipped: Callable[[Problem], None] | None = None,
    input_name: str | None = None,
    tenant: str = TENANT,
    wishes: Wishes = NO_WISHES,
    about: Mapping[str, Any] = NOTHING,
    key: str | None = None,
) -> Submitted:
    """Store the file as a batch and set it going; return once all of it is committed.

    With `reuse` the same file and options within an hour give the batch that runs or was completed, also when two
    race; with a `key` its one batch, for as long as that is kept. `about` is kept with the batch's options.
    `on_progress` hears (bytes validated, bytes of the file). With `on_skipped` bad lines are left out and it hears of
    each, in their order; without, one refuses the file. Any error, Ctrl-C included, leaves no rows; a kill leaves a
    validating batch for `delete_abandoned_batches`. Raises InvalidFile, BadInput, ServiceUnreachable.
    """
    window = timedelta(seconds=settings.limits.window_s)
    with opened(path) as file:
        source = _source(file, options, settings, served_models, on_progress, on_skipped)
        input_digest = source.digest()
        skip_bad = on_skipped is not None
        digest = _submit_digest(input_digest, options, window, wishes, skip_bad=skip_bad, about=about)
        digest, keyed = (digest, NOTHING) if key is None else _keyed(digest, key)
        if reuse and (earlier := same_submit(database, tenant=tenant, submit_digest=digest, asked=keyed.get("asked"))):
            return earlier
        lines = iter(source)
        first = next(lines)  # states the endpoint; a file without a good line ends here, before any row
        if wishes.results_of is not None:
            validated = options.validate_answers
            check_reusable(database, wishes.results_of, endpoint=first.url, validate_answers=validated, tenant=tenant)
        name = input_name or path.name
        manifest = {"file_name": name, "file_bytes": source.size_bytes, "file_sha256": input_digest}
        batch = NewBatch(
            id=uuid7(),
            tenant=tenant,
            endpoint=first.url,
            input_name=name,
            input_digest=input_digest,
            submit_digest=digest,
            options=options.model_dump() | manifest | dict(about) | dict(keyed),
            max_output_tokens=options.max_output_tokens,
            priority=wishes.priority,
            weight=wishes.weight,
        )

        def fill() -> Filled:
            return _store(database, batch, chain([first], lines), source, wishes=wishes, bounds=settings.shard)

        return begin_batch(database, batch, fill, window=window, reuse=reuse)


def fill_held(
    database: Database,
    path: Path,
    batch: NewBatch,
    *,
    options: SubmitOptions,
    settings: Settings,
    served_models: ServedModels | None,
    order: JobOrder,
    go_on: Callable[[], None],
) -> Filled:
    """Store the file as the jobs of a batch that a validator holds, and set it going; `go_on` may raise to end it.

    Raises InvalidFile, and LostFence when the batch is no longer held or was cancelled: the caller clears the rest.
    """
    with opened(path) as file:
        source = _source(file, options, settings, served_models, None, None, endpoint=batch.endpoint)
        manifest = {"file_name": batch.input_name, "file_bytes": source.size_bytes, "file_sha256": batch.input_digest}
        batch = replace(batch, options=options.model_dump(mode="json") | manifest)
        lines = _within_limits(source, settings, go_on)
        filled = _store(database, batch, lines, source, wishes=Wishes(order=order), bounds=settings.shard)
    with database.transaction() as session:
        set_going(session, batch, filled, window=timedelta(seconds=settings.limits.window_s))
    return filled


def _within_limits(lines: Iterable[ParsedLine], settings: Settings, go_on: Callable[[], None]) -> Iterator[ParsedLine]:
    """The lines, until they are more than one batch may have."""
    most_lines, most_tokens = settings.gateway.batch_lines, settings.gateway.batch_tokens
    tokens = 0
    for count, line in enumerate(lines, 1):
        tokens += line.prompt_tokens + line.output_tokens
        if count % PROGRESS_EVERY_LINES == 0:
            go_on()
        if most_lines is not None and count > most_lines:
            message = f"has more than {most_lines:,} lines, the most of one batch here; split it"
            raise InvalidFile([Problem(None, "too_many_tasks", None, message)], total=1)
        if most_tokens is not None and tokens > most_tokens:
            message = (
                f"may take more than {most_tokens:,} tokens, the most of one batch here; split it, or limit outputs"
            )
            raise InvalidFile([Problem(None, "token_limit_exceeded", None, message)], total=1)
        yield line


def dry_run(
    path: Path,
    *,
    options: SubmitOptions,
    settings: Settings,
    served_models: ServedModels | None,
    on_progress: Progress | None = None,
    on_skipped: Callable[[Problem], None] | None = None,
) -> FileEstimate:
    """What `submit_file` would store, and its errors, without a database."""
    with opened(path) as file:
        source = _source(file, options, settings, served_models, on_progress, on_skipped)
        prompt_tokens = output_tokens = 0
        models: Counter[str] = Counter()
        semantic = SemanticLines()
        for line in source:
            models[line.model] += 1
            if line.cache is CacheMode.SEMANTIC:
                semantic.add(line)
            prompt_tokens += line.prompt_tokens
            output_tokens += line.output_tokens
        return FileEstimate(
            lines=models.total(),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            models=dict(models),
            endpoint=source.endpoint or "",
            skipped=source.skipped,
            notices=semantic.notices,
        )


def _source(
    file: BufferedReader,
    options: SubmitOptions,
    settings: Settings,
    served_models: ServedModels | None,
    on_progress: Progress | None,
    on_skipped: Callable[[Problem], None] | None,
    *,
    endpoint: str | None = None,
) -> BatchFile:
    rules = LineRules(options=options, line_bytes=settings.limits.line_bytes, sampled=settings.cache.sampled)
    read = (
        partial(BatchFile, endpoint=endpoint)
        if on_skipped is None
        else partial(SkippingBatchFile, on_skipped=on_skipped)
    )
    return read(file, rules=rules, served_models=served_models, on_progress=on_progress)


def _submit_digest(
    input_digest: str,
    options: SubmitOptions,
    window: timedelta,
    wishes: Wishes,
    *,
    skip_bad: bool,
    about: Mapping[str, Any],
) -> str:
    """sha256 of all that makes two submits the same: the file, what is changed in it, and how it is to run."""
    asked = options.model_dump() | {"window_s": window.total_seconds(), "skip_bad": skip_bad, "wishes": wishes, **about}
    canonical = msgspec.json.encode(asked, order="deterministic")
    return hashlib.sha256(input_digest.encode() + b"\n" + canonical).hexdigest()


def _keyed(digest: str, key: str) -> tuple[str, Mapping[str, Any]]:
    """The digest that stands for a key, and what is kept with its batch: by which file and options it was made."""
    return digest_of_key(key), {"idempotency_key": key, "asked": digest}


@dataclass(frozen=True, slots=True)
class _Stored:
    """The lines on their way into Postgres, and what is learned of them in passing."""

    lines: Iterator[ParsedLine]
    digests: DigestBuckets
    semantic: SemanticLines


def _store(
    database: Database,
    batch: NewBatch,
    lines: Iterator[ParsedLine],
    source: BatchFile,
    *,
    wishes: Wishes,
    bounds: ShardSettings,
) -> Filled:
    """Store all lines, then settle which of them run, and in what order."""
    with database.transaction() as session:
        if wishes.budget_tokens is not None:
            open_batch_budget(session, batch.id, wishes.budget_tokens)
        if wishes.budget_nanos is not None:
            open_batch_money(session, batch.id, wishes.budget_nanos)
    semantic = SemanticLines()
    with DigestBuckets("qi") as digests:
        stored = _Stored(lines, digests, semantic)
        filled = _fill(database, batch, stored, source, order=wishes.order, bounds=bounds)
        return arrange(
            database, batch, filled, digests, results_of=wishes.results_of, pilot=bool(semantic), bounds=bounds
        )


def _fill(
    database: Database,
    batch: NewBatch,
    stored: _Stored,
    source: BatchFile,
    *,
    order: JobOrder,
    bounds: ShardSettings,
) -> Filled:
    """Store all lines, a chunk a transaction; cut shards a window of the order at a time, in a transaction of its own.

    Shards count for nothing before the batch is set going, so whoever dies leaves a validating batch.
    """
    total = shards = 0
    is_ordered = False
    lines, semantic = stored.lines, stored.semantic
    window = _Window(batch, order, bounds, first_seq=0)
    for first in lines:
        with database.transaction() as session:
            extend_lease(session, batch, lease=LEASE)
            chunk = _chunk(replace(stored, lines=chain([first], lines)), window, first_seq=total)
            total += copy_jobs(session, chunk, batch_id=batch.id, first_seq=total)
        stored.digests.settle()
        if total - window.first_seq >= WINDOW_JOBS:
            shards += window.cut(database)
            is_ordered |= window.is_ordered
            window = _Window(batch, order, bounds, first_seq=total)
    shards += window.cut(database)
    is_ordered |= window.is_ordered
    return Filled(
        total=total,
        open_shards=shards,
        skipped=source.skipped,
        options={**semantic.options, "order": (order if is_ordered else JobOrder.FILE).value},
        notices=(*semantic.notices, *((ORDERED,) if is_ordered else ())),
    )


class _Window:
    """The jobs whose shards are cut together, in the file's order or in one that reuses prefixes."""

    def __init__(self, batch: NewBatch, order: JobOrder, bounds: ShardSettings, *, first_seq: int) -> None:
        self.first_seq = first_seq
        self.cutter = ShardCutter(bounds, first=first_seq)
        self.tree = None if order is JobOrder.FILE else PrefixTree(batch.endpoint)
        self._batch, self._order, self._bounds = batch, order, bounds

    @property
    def is_ordered(self) -> bool:
        """Whether its jobs leave the file's order."""
        return self.tree is not None and self.tree.is_worth_sorting()

    def cut(self, database: Database) -> int:
        """Store its shards: how many."""
        if self.tree is None or not self.is_ordered:
            spans = self.cutter.spans()
            with database.transaction() as session:
                extend_lease(session, self._batch, lease=LEASE)
                insert_shards(session, spans, batch_id=self._batch.id)
            return len(spans)
        ordered = self.tree.ordered(self._order)
        spans = cut_ordered(ordered, self._bounds)
        with database.transaction() as session:
            extend_lease(session, self._batch, lease=LEASE)
            for at in range(0, len(spans), PAGE_SHARDS):
                page = spans[at : at + PAGE_SHARDS]
                first, last = page[0][0], page[-1][1]
                insert_shards(
                    session,
                    [(one - first, other - first, tokens) for one, other, tokens in page],
                    batch_id=self._batch.id,
                    seqs=[self.first_seq + place for place in ordered.places[first : last + 1]],
                )
        return len(spans)


def _chunk(stored: _Stored, window: _Window, *, first_seq: int) -> Iterator[ParsedLine]:
    """The lines of one transaction, each counted by the window, and remembered if it may share its answer."""
    last_seq, chunk_bytes = first_seq + CHUNK_JOBS - 1, 0
    count_in, (keep_digest, keep_seq), similar = window.cutter.add, stored.digests.appends, CacheMode.SEMANTIC
    learn = window.tree.add if window.tree is not None else None
    for seq, line in enumerate(stored.lines, first_seq):
        body = line.body
        size = len(body)
        count_in(line.prompt_tokens + line.output_tokens, size)
        if learn is not None:
            learn(line.model, body, line.output_tokens)
        is_similar = line.cache is similar
        if line.may_share:
            digest = ~hash(body) if is_similar else hash(body)
            bucket = digest & LOW_BITS
            keep_digest[bucket](digest)
            keep_seq[bucket](seq)
        if is_similar:
            stored.semantic.add(line)
        yield line
        chunk_bytes += size
        if seq == last_seq or chunk_bytes >= CHUNK_BYTES:
            break
