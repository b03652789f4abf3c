"""SQL of the `usage` rows: what a batch takes of an engine or endpoint on each day of UTC, kept when the batch is gone.

Several workers write results of one batch at once, so its rows are spread over slots. One statement that adds to
several rows does it in the order of their engines: two of them never wait for each other.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.jobs import Usage

SLOTS: Final = 32  # shards that are written at the same moment seldom share one of so many
SINGLE: Final = UUID(int=0)  # the batch of requests that are in none

_ROWS = """
    INSERT INTO usage (tenant, key_id, batch_id, engine_id, day, slot, jobs, prompt_tokens, completion_tokens,
        cached_tokens, cost)"""
_KEYS = """CAST(:tenant AS text), CAST(:key_id AS text), CAST(:batch_id AS uuid), engine_id,
        CAST(now() AT TIME ZONE 'UTC' AS date), CAST(:slot AS int2)"""
_ADDED = """
    ON CONFLICT (tenant, key_id, batch_id, engine_id, day, slot) DO UPDATE SET jobs = usage.jobs + excluded.jobs,
        prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = usage.completion_tokens + excluded.completion_tokens,
        cached_tokens = usage.cached_tokens + excluded.cached_tokens, cost = usage.cost + excluded.cost"""

# The part of a write that counts, by engine, which of the rows that it inserted, `i`, an engine answered.
USAGE_OF_WRITTEN = f"""
, taken AS ({_ROWS}
    SELECT {_KEYS}, count(*), sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens),
        CAST(coalesce(sum(cost), 0) AS int8)
    FROM i WHERE source = 'engine' AND engine_id IS NOT NULL GROUP BY engine_id ORDER BY engine_id{_ADDED}
)"""


def slot_of(shard_id: int) -> int:
    """The slot that a shard's writes go to."""
    return shard_id % SLOTS


def fold_usage(session: Session, batch_id: UUID) -> None:
    """Let an ended batch have one row an engine and day: nothing is written any more, so nobody waits for a slot."""
    session.execute(
        text(f"""
        WITH gone AS (DELETE FROM usage WHERE batch_id = :id AND slot <> 0 RETURNING *)
        {_ROWS}
        SELECT tenant, key_id, batch_id, engine_id, day, 0, sum(jobs), sum(prompt_tokens), sum(completion_tokens),
            sum(cached_tokens), sum(cost)
        FROM gone GROUP BY tenant, key_id, batch_id, engine_id, day{_ADDED}"""),
        {"id": batch_id},
    )


def add_usage(
    session: Session, *, tenant: str, key_id: str, engine_id: int, usage: Usage, cost: int = 0, slot: int = 0
) -> None:
    """Count a single request that an engine answered: `cost` in nanos, `key_id` '' without a key.

    Not repeatable: after an ambiguous COMMIT it may be counted twice or not at all.
    """
    session.execute(
        text(f"""{_ROWS}
    SELECT {_KEYS}, 1, :prompt_tokens, :completion_tokens, :cached_tokens, :cost
    FROM (SELECT CAST(:engine_id AS int4) AS engine_id) AS e{_ADDED}"""),
        {
            "tenant": tenant,
            "key_id": key_id,
            "batch_id": SINGLE,
            "engine_id": engine_id,
            "slot": slot % SLOTS,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "cost": cost,
        },
    )
