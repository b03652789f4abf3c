"""Submit: validate a batch file while it streams into Postgres, all of it or nothing.

The batch is `validating` and invisible to dispatch until its last transaction. It must not hold the file
in memory, nor leave rows of a file that was refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
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
LEASE = timedelta(minutes=5)  # of one chunk, or of the search for duplicates at the end (10,000,000 ids: seconds)
REUSE_FOR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The batch that runs the file. `reused`: it is an earlier one, nothing new was stored."""

    batch_id: UUID
    total: int
    reused: bool


@dataclass(frozen=True, slots=True)
class FileEstimate:
    """What a file would become. Tokens are estimates: a quarter of the body's bytes, and the most that may be generated."""

    lines: int
    prompt_tokens: int
    output_tokens: int
    models: dict[str, int]
    endpoint: str


@dataclass(slots=True)
class _Chunk:
    """Lines of one transaction, and where their shards begin and end."""

    next_seq: int
    lines: int = 0
    bytes: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


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

    With `reuse` the same file and options within an hour give the batch that runs or was completed, also
    when two submits race. `on_progress` hears (bytes validated, bytes of the file). Any error, Ctrl-C
    included, leaves no rows; a kill leaves a validating batch for `delete_abandoned_batches`.
    Raises InvalidFile with the first problems, BadInput for a file that cannot be read, ServiceUnreachable.
    """
    with opened(path) as file:
        source = BatchFile(file, rules=_rules(options, settings), served_models=served_models, on_progress=on_progress)
        input_digest = source.digest()
        submit_digest = _submit_digest(input_digest, options)
        if reuse and (earlier := _same_submit(database, tenant, submit_digest)):
            return earlier
        lines = iter(source)
        lines = chain([next(lines)], lines)  # from here the endpoint is known; without a good line this raises
        batch = NewBatch(
            id=uuid7(), tenant=tenant, endpoint=source.endpoint or "", input_name=input_name or path.name,
            input_digest=input_digest, submit_digest=submit_digest, max_output_tokens=options.max_output_tokens,
            options={**options.model_dump(), "file_name": input_name or path.name,
                     "file_bytes": source.size_bytes, "file_sha256": input_digest},
        )
        try:
            with database.transaction() as session:
                insert_validating(session, batch, lease=LEASE)
            total, shards = _store(database, batch.id, lines, bounds=settings.shard)
            return _set_going(database, batch, total=total, shards=shards, reuse=reuse,
                              window=timedelta(seconds=settings.limits.window_s))
        except BaseException:
            _delete(database, batch.id)
            raise


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
        source = BatchFile(file, rules=_rules(options, settings), served_models=served_models, on_progress=on_progress)
        prompt_tokens = output_tokens = 0
        models: Counter[str] = Counter()
        for line in source:
            models[line.model] += 1
            prompt_tokens += line.prompt_tokens
            output_tokens += line.output_tokens
        return FileEstimate(lines=models.total(), prompt_tokens=prompt_tokens, output_tokens=output_tokens,
                            models=dict(models), endpoint=source.endpoint or "")


def _rules(options: SubmitOptions, settings: Settings) -> LineRules:
    return LineRules(options=options, line_bytes=settings.limits.line_bytes)


def _submit_digest(input_digest: str, options: SubmitOptions) -> str:
    canonical = msgspec.json.encode(options.model_dump(), order="deterministic")
    return hashlib.sha256(input_digest.encode() + b"\n" + canonical).hexdigest()


def _same_submit(database: Database, tenant: str, submit_digest: str) -> Submitted | None:
    with database.transaction() as session:
        earlier = find_same_submit(session, tenant=tenant, submit_digest=submit_digest, younger_than=REUSE_FOR)
    return None if earlier is None else Submitted(earlier.id, earlier.total, reused=True)


def _store(
    database: Database, batch_id: UUID, lines: Iterator[ParsedLine], *, bounds: ShardSettings
) -> tuple[int, int]:
    """Store all lines, a chunk a transaction; return how many, and how many shards they make."""
    total = shards = 0
    for first in lines:
        chunk = _Chunk(next_seq=total)
        with database.transaction() as session:
            extend_lease(session, batch_id, lease=LEASE)
            total += copy_jobs(session, _cut(chain([first], lines), chunk, bounds), batch_id=batch_id, first_seq=total)
            insert_shards(session, chunk.spans, batch_id=batch_id)
        shards += len(chunk.spans)
    return total, shards


def _cut(lines: Iterator[ParsedLine], chunk: _Chunk, bounds: ShardSettings) -> Iterator[ParsedLine]:
    """The lines of one chunk; afterwards `chunk.spans` holds its shards, each within the bounds or one line long."""
    first = seq = chunk.next_seq
    last_seq = seq + CHUNK_LINES - 1
    shard_tokens = shard_bytes = chunk_bytes = 0
    for line in lines:
        tokens, size = line.prompt_tokens + line.output_tokens, len(line.body)
        shard_tokens += tokens
        shard_bytes += size
        if seq - first >= bounds.max_jobs or (
            (shard_tokens > bounds.max_tokens or shard_bytes > bounds.max_bytes) and seq > first
        ):
            chunk.spans.append((first, seq - 1))
            first, shard_tokens, shard_bytes = seq, tokens, size
        yield line
        chunk_bytes += size
        seq += 1
        if seq > last_seq or chunk_bytes >= CHUNK_BYTES:
            break
    chunk.spans.append((first, seq - 1))


def _set_going(
    database: Database, batch: NewBatch, *, total: int, shards: int, reuse: bool, window: timedelta
) -> Submitted:
    """The last transaction. If the same submit was quicker, its batch is the answer and ours is deleted."""
    with database.transaction() as session:
        earlier = None
        if reuse:
            lock_submit(session, tenant=batch.tenant, submit_digest=batch.submit_digest)
            earlier = find_same_submit(session, tenant=batch.tenant, submit_digest=batch.submit_digest,
                                       younger_than=REUSE_FOR)
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
