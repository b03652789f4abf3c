"""Running lines again: a new batch of a batch's failed lines, and results taken over from an earlier batch.

The earlier batch is only read: an ended batch stays as it ended.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any
from uuid import UUID

from models.names import short_name
from models.states import TERMINAL, JobOrder, Priority, Trust
from pipeline.arrange import cut_again
from pipeline.begin import CHUNK_JOBS, LEASE, TENANT, Submitted, begin_batch, same_submit
from pipeline.cutting import ShardCutter
from runtime.clock import uuid7
from runtime.errors import BadInput
from runtime.settings import Settings, ShardSettings
from store.again import EarlierBatch, copy_failed_jobs, hold_ended, read_earlier
from store.database import Database
from store.followers import copy_followers
from store.money import open_batch_money
from store.open_shards import CutJob, newest_shard
from store.submissions import Filled, NewBatch, extend_lease, insert_shards

# Options that say what became of the earlier batch's own file.
FOUND_AT_SUBMIT = frozenset({"reused", "order", "pilot", "idempotency_key", "asked"})


def retry_batch(
    database: Database,
    batch_id: UUID,
    *,
    settings: Settings,
    reuse: bool,
    priority: Priority | None = None,
    weight: float | None = None,
    tenant: str = TENANT,
    key_id: str | None = None,
    request: dict[str, Any] | None = None,
    trust: Trust | None = None,
    budget_nanos: int | None = None,
    chunk_jobs: int = CHUNK_JOBS,
) -> Submitted:
    """Store the failed lines of an ended batch as a new one, with its options, and set that going.

    Failed are those of a cancelled or expired batch too that never ran. With `reuse` a second retry of the same
    batch within an hour is the first one, while that runs or if it was completed. Raises NotFound, and BadInput
    when the batch still runs or has no failed line. `key_id` and `request` as of a batch that the gateway begins.
    `trust`, if stated, is its own; `budget_nanos` is what priced endpoints may ask for it.
    """
    with database.transaction() as session:
        earlier = read_earlier(session, batch_id, tenant=tenant)
    _check_retryable(earlier)
    options = _options(earlier, trust=trust, has_money=budget_nanos is not None)
    asked = "" if trust is None and budget_nanos is None else f" {trust} {budget_nanos}"
    digest = hashlib.sha256(f"retry {batch_id.hex}{asked}".encode()).hexdigest()
    if reuse and (found := same_submit(database, tenant=tenant, submit_digest=digest)):
        return found
    batch = NewBatch(
        id=uuid7(),
        tenant=tenant,
        endpoint=earlier.endpoint,
        input_name=earlier.input_name,
        input_digest=earlier.input_digest,
        submit_digest=digest,
        options=options,
        max_output_tokens=earlier.max_output_tokens,
        priority=priority or earlier.priority,
        weight=weight or earlier.weight,
        retry_of=batch_id,
        key_id=key_id,
        request=request,
    )

    def fill() -> Filled:
        if budget_nanos is not None:
            with database.transaction() as session:
                open_batch_money(session, batch.id, budget_nanos)
        return _copy_failed(database, earlier, batch, bounds=settings.shard, chunk_jobs=chunk_jobs)

    window = timedelta(seconds=settings.limits.window_s)
    return begin_batch(database, batch, fill, window=window, reuse=reuse)


def check_reusable(database: Database, batch_id: UUID, *, endpoint: str, validate_answers: bool, tenant: str) -> None:
    """Raises BadInput unless the batch's results can answer a batch of this endpoint; NotFound if it is gone."""
    with database.transaction() as session:
        earlier = read_earlier(session, batch_id, tenant=tenant)
    if earlier.endpoint != endpoint:
        raise BadInput(
            f"--reuse {short_name(batch_id)}: its lines have {earlier.endpoint}, these have {endpoint}; "
            "name a batch with the same endpoint"
        )
    if validate_answers and not earlier.options.get("validate_answers"):
        raise BadInput(
            f"--reuse {short_name(batch_id)}: its answers were not validated, as these are to be; name another"
        )


def _options(earlier: EarlierBatch, *, trust: Trust | None, has_money: bool) -> dict[str, Any]:
    options = {name: value for name, value in earlier.options.items() if name not in FOUND_AT_SUBMIT}
    if trust is not None:
        options["trust"] = trust.value
    if has_money and options.get("trust") != Trust.EXTERNAL:
        raise BadInput(
            f"{short_name(earlier.id)} stays on own endpoints, so a budget of money would never be used: add "
            "--trust external, or leave it out"
        )
    return options


def _check_retryable(earlier: EarlierBatch) -> None:
    name = short_name(earlier.id)
    if earlier.state not in TERMINAL:
        raise BadInput(
            f"{name} still runs ({earlier.state.value}): wait with `stoker watch {name}`, or `stoker cancel {name}`, "
            "then retry it"
        )
    if not earlier.failed:
        raise BadInput(f"{name} has no failed line: there is nothing to retry; run its file again with `stoker submit`")


def _copy_failed(
    database: Database, earlier: EarlierBatch, batch: NewBatch, *, bounds: ShardSettings, chunk_jobs: int
) -> Filled:
    """Copy all failed jobs, a chunk a transaction, and cut shards of them; at last who followed whom."""
    total = shards = 0
    after_seq = -1
    while True:
        with database.transaction() as session:
            extend_lease(session, batch, lease=LEASE)
            hold_ended(session, earlier.id)
            after_seq, jobs = copy_failed_jobs(
                session, earlier.id, batch_id=batch.id, after_seq=after_seq, first_seq=total, limit=chunk_jobs
            )
            if not jobs:
                break
            spans = _cut(jobs, bounds=bounds, first=total)
            insert_shards(session, spans, batch_id=batch.id)
        total += len(jobs)
        shards += len(spans)
    with database.transaction() as session:
        extend_lease(session, batch, lease=LEASE)
        hold_ended(session, earlier.id)
        followers = copy_followers(session, earlier.id, batch_id=batch.id)
        if followers:
            shards = cut_again(session, batch.id, upto=newest_shard(session, batch.id), bounds=bounds)
    options = {"order": JobOrder.FILE.value}
    return Filled(total=total, open_shards=shards, followers=followers, options=options)


def _cut(jobs: list[CutJob], *, bounds: ShardSettings, first: int) -> list[tuple[int, int, int]]:
    cutter = ShardCutter(bounds, first=first)
    for job in jobs:
        cutter.add(job.tokens, job.size_bytes)
    return cutter.spans()
