"""Submit: validate a batch file while it streams into Postgres, all of it or nothing.

The batch is `validating` and invisible to dispatch until its last transaction. It must not hold the file
in memory, nor leave rows of a file that was refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import BufferedReader
from itertools import chain
from pathlib import Path
from uuid import UUID

import msgspec

from models.lines import LineRules, ParsedLine, SubmitOptions
from pipeline.batch_file import BatchFile, Progress, opened
from runtime.clock import uuid7
from runtime.errors import StokerError
from runtime.settings import Settings, ShardSettings
from store.database import Database
from store.submissions import (
    NewBatch,
    copy_jobs,
    delete_validating,
    extend_lease,
    find_same_submit,
    insert_shards,
    insert_validating,
    lock_submit,
    set_going,
)

TENANT = "local"
CHUNK_LINES = 50_000
CHUNK_BYTES = 256 * 1024 * 1024
LEASE = timedelta(minutes=5)  # must outlast the check of all ids before the last step: seconds at 10,000,000
REUSE_FOR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The batch that runs the file. `reused`: it is an earlier one, nothing new was stored."""

    batch_id: UUID
    total: int
    reused: bool


@dataclass(frozen=True, slots=True)
class FileEstimate:
    """What a file would become. Tokens are estimates: the bodies' bytes / 4, and the most to generate."""

    lines: int
    prompt_tokens: int
    output_tokens: int
    models: dict[str, int]
    endpoint: str


def submit_file(
    database: Database,
    path: Path,
    *,
    options: SubmitOptions,
    settings: Settings,
    served_models: frozenset[str] | None,
    reuse: bool,
    on_progress: Progress | None = None,
    input_name: str | None = None,
    tenant: str = TENANT,
) -> Submitted:
    """Store the file as a batch and set it going; return once all of it is committed.

    With `reuse` the same file and options within an hour give the batch that runs or was completed, also when two
    race. `on_progress` hears (bytes validated, bytes of the file). Any error, Ctrl-C included, leaves no rows; a
    kill leaves a validating batch for `delete_abandoned_batches`. Raises InvalidFile, BadInput, ServiceUnreachable.
    """
    window = timedelta(seconds=settings.limits.window_s)
    with opened(path) as file:
        source = _source(file, options, settings, served_models, on_progress)
        input_digest = source.digest()
        submit_digest = _submit_digest(input_digest, options, window)
        if reuse and (earlier := _same_submit(database, tenant, submit_digest)):
            return earlier
        lines = iter(source)
        first = next(lines)  # states the endpoint; a file without a good line ends here, before any row
        name = input_name or path.name
        manifest = {"file_name": name, "file_bytes": source.size_bytes, "file_sha256": input_digest}
        batch = NewBatch(
            id=uuid7(),
            tenant=tenant,
            endpoint=first.url,
            input_name=name,
            input_digest=input_digest,
            submit_digest=submit_digest,
            options=options.model_dump() | manifest,
            max_output_tokens=options.max_output_tokens,
        )
        return _store_and_go(database, batch, chain([first], lines), bounds=settings.shard, window=window, reuse=reuse)


def dry_run(
    path: Path,
    *,
    options: SubmitOptions,
    settings: Settings,
    served_models: frozenset[str] | None,
    on_progress: Progress | None = None,
) -> FileEstimate:
    """What `submit_file` would store, and its errors, without a database."""
    with opened(path) as file:
        source = _source(file, options, settings, served_models, on_progress)
        prompt_tokens = output_tokens = 0
        models: Counter[str] = Counter()
        for line in source:
            models[line.model] += 1
            prompt_tokens += line.prompt_tokens
            output_tokens += line.output_tokens
        return FileEstimate(
            lines=models.total(),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            models=dict(models),
            endpoint=source.endpoint or "",
        )


def _source(
    file: BufferedReader,
    options: SubmitOptions,
    settings: Settings,
    served_models: frozenset[str] | None,
    on_progress: Progress | None,
) -> BatchFile:
    rules = LineRules(options=options, line_bytes=settings.limits.line_bytes)
    return BatchFile(file, rules=rules, served_models=served_models, on_progress=on_progress)


def _submit_digest(input_digest: str, options: SubmitOptions, window: timedelta) -> str:
    """sha256 of all that makes two submits the same: the file, what is changed in it, and its window."""
    wishes = options.model_dump() | {"window_s": window.total_seconds()}
    canonical = msgspec.json.encode(wishes, order="deterministic")
    return hashlib.sha256(input_digest.encode() + b"\n" + canonical).hexdigest()


def _same_submit(database: Database, tenant: str, submit_digest: str) -> Submitted | None:
    with database.transaction() as session:
        earlier = find_same_submit(session, tenant=tenant, submit_digest=submit_digest, younger_than=REUSE_FOR)
    return None if earlier is None else Submitted(earlier.id, earlier.total, reused=True)


def _store_and_go(
    database: Database,
    batch: NewBatch,
    lines: Iterator[ParsedLine],
    *,
    bounds: ShardSettings,
    window: timedelta,
    reuse: bool,
) -> Submitted:
    """The whole way of a new batch; any error, Ctrl-C included, deletes what was stored of it."""
    try:
        with database.transaction() as session:
            insert_validating(session, batch, lease=LEASE)
        total, shards = _store(database, batch.id, lines, bounds=bounds)
        return _set_going(database, batch, total=total, shards=shards, reuse=reuse, window=window)
    except BaseException:
        _delete(database, batch.id)
        raise


def _store(
    database: Database, batch_id: UUID, lines: Iterator[ParsedLine], *, bounds: ShardSettings
) -> tuple[int, int]:
    """Store all lines, a chunk a transaction; return how many, and how many shards they make."""
    total = shards = 0
    for first in lines:
        spans: list[tuple[int, int]] = []
        with database.transaction() as session:
            extend_lease(session, batch_id, lease=LEASE)
            chunk = _chunk(chain([first], lines), spans, first_seq=total, bounds=bounds)
            total += copy_jobs(session, chunk, batch_id=batch_id, first_seq=total)
            insert_shards(session, spans, batch_id=batch_id)
        shards += len(spans)
    return total, shards


def _chunk(
    lines: Iterator[ParsedLine], spans: list[tuple[int, int]], *, first_seq: int, bounds: ShardSettings
) -> Iterator[ParsedLine]:
    """The lines of one transaction. Fills `spans` with (first, last) seq of each shard.

    A shard keeps within the bounds unless a single line exceeds them.
    """
    start = first_seq  # of the shard
    tokens = size = chunk_bytes = 0
    for seq, line in enumerate(lines, first_seq):
        tokens += line.prompt_tokens + line.output_tokens
        size += len(line.body)
        if seq > start and (seq - start >= bounds.max_jobs or tokens > bounds.max_tokens or size > bounds.max_bytes):
            spans.append((start, seq - 1))
            start, tokens, size = seq, line.prompt_tokens + line.output_tokens, len(line.body)
        yield line
        chunk_bytes += len(line.body)
        if seq - first_seq + 1 >= CHUNK_LINES or chunk_bytes >= CHUNK_BYTES:
            break
    spans.append((start, seq))


def _set_going(
    database: Database, batch: NewBatch, *, total: int, shards: int, reuse: bool, window: timedelta
) -> Submitted:
    """The last transaction. If the same submit was quicker, its batch is the answer and ours is deleted."""
    with database.transaction() as session:
        earlier = None
        if reuse:
            lock_submit(session, tenant=batch.tenant, submit_digest=batch.submit_digest)
            earlier = find_same_submit(
                session, tenant=batch.tenant, submit_digest=batch.submit_digest, younger_than=REUSE_FOR
            )
        if earlier is None:
            set_going(session, batch.id, total=total, shards=shards, window=window)
    if earlier is None:
        return Submitted(batch.id, total, reused=False)
    _delete(database, batch.id)
    return Submitted(earlier.id, earlier.total, reused=True)


def _delete(database: Database, batch_id: UUID) -> None:
    """Best effort: what a broken connection leaves is deleted when the lease is over."""
    with suppress(StokerError), database.transaction() as session:
        delete_validating(session, batch_id)
