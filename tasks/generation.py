"""The generation node's task."""

from __future__ import annotations

import asyncio
import time
from contextvars import copy_context
from uuid import UUID

from models.messages import RunShard
from pipeline.feed import FeedContext, FeedReport, feed
from runtime.logs import get_logger
from runtime.tracing import SHARD_ID, Value, batch_span

log = get_logger(__name__)


def run_shard(
    context: FeedContext, runner: asyncio.Runner, message: RunShard, *, traceparent: str | None = None
) -> str:
    """Claim the shard that is to go first and run it, and others after it while there are some; says what it did.

    Safe to run twice and to die at any line: the message is only a hint, the shard's fence guards every write,
    and an unfinished shard's lease runs out. Always ends so that the message is acknowledged.
    """
    started = time.monotonic()
    batch_id = UUID(message.batch_id)
    told: dict[str, Value] = {"messaging.system": "celery", SHARD_ID: message.shard_id}
    with batch_span("process generation", batch_id, kind="consumer", attributes=told, header=traceparent) as span:
        report = runner.run(feed(context), context=copy_context())  # else the runner's own, without this span
        span.set({"stoker.shards": report.shards, "stoker.jobs": report.jobs})
    seconds = round(time.monotonic() - started, 2)
    log.info(
        "shards_fed",
        hint=message.shard_id,
        batch_id=message.batch_id,
        shards=report.shards,
        jobs=report.jobs,
        seconds=seconds,
    )
    return _told(report, seconds)


def _told(report: FeedReport, seconds: float) -> str:
    if not report.shards:
        return "nothing was left to do"
    pace = f"{report.jobs / seconds:,.1f} jobs/s" if seconds else "at once"
    return f"shards: {report.shards}, jobs: {report.jobs:,}, {pace}"
