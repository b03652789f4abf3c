"""The generation node's task."""

from __future__ import annotations

import asyncio
import time

from models.messages import RunShard
from pipeline.feed import FeedContext, feed
from runtime.logs import get_logger

log = get_logger(__name__)


def run_shard(context: FeedContext, runner: asyncio.Runner, message: RunShard) -> None:
    """Claim the shard that is to go first and run it, and others after it while there are some.

    Safe to run twice and to die at any line: the message is only a hint, the shard's fence guards every write,
    and an unfinished shard's lease runs out. Always ends so that the message is acknowledged.
    """
    started = time.monotonic()
    report = runner.run(feed(context))
    log.info(
        "shards_fed",
        hint=message.shard_id,
        batch_id=message.batch_id,
        shards=report.shards,
        jobs=report.jobs,
        seconds=round(time.monotonic() - started, 2),
    )
