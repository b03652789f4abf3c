"""Batches as submit stores them, and a short way to look at their rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import text

from models.jobs import JobResult, Usage
from models.lines import SubmitOptions
from models.states import Outcome
from pipeline.submit import submit_file
from runtime.settings import LimitSettings, Settings, ShardSettings
from store.database import Database
from store.dispatching import candidates, mark_dispatched
from store.shards import Claim, claim

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
LEASE_S = 30.0


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A row of shards."""

    id: int
    seqs: tuple[int, ...]
    state: str
    fence: int
    crashes: int
    done: int
    failed: int
    truncated: int
    empty: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A row of results."""

    seq: int
    outcome: str
    status_code: int | None
    response: str | None
    error_code: str | None
    error_message: str | None
    engine_id: int | None


def chat(prompt: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat with one message."""
    return {"model": "scripted", "messages": [{"role": "user", "content": prompt}], **fields}


def chats(count: int) -> list[dict[str, Any]]:
    """As many different bodies."""
    return [chat(f"question {number}") for number in range(count)]


def store_batch(
    database: Database,
    folder: Path,
    bodies: Sequence[dict[str, Any]],
    *,
    shard_jobs: int = 64,
    endpoint: str = CHAT,
    tenant: str = "local",
    window_s: float = 86_400.0,
) -> UUID:
    """Submit a file with these bodies, `id-0` and so on, in shards of `shard_jobs`; return the batch."""
    file = folder / f"{uuid4().hex}.jsonl"
    file.write_text(
        "".join(
            json.dumps({"custom_id": f"id-{seq}", "method": "POST", "url": endpoint, "body": body}) + "\n"
            for seq, body in enumerate(bodies)
        )
    )
    settings = Settings.model_construct(
        shard=ShardSettings(max_jobs=shard_jobs), limits=LimitSettings(window_s=window_s)
    )
    return submit_file(
        database,
        file,
        options=SubmitOptions(max_output_tokens=64),
        settings=settings,
        served_models=None,
        reuse=False,
        tenant=tenant,
    ).batch_id


def dispatch_all(database: Database) -> list[int]:
    """Turn every pending shard that is due to dispatched; return their ids."""
    with database.transaction() as session:
        chosen = [shard_id for batch in candidates(session, limit=10_000) for shard_id, _ in batch.shards]
        return sorted(shard_id for shard_id, _ in mark_dispatched(session, chosen)) if chosen else []


def claimed(database: Database, shard_id: int, *, holder: str = "test", lease_s: float = LEASE_S) -> Claim:
    """Claim a dispatched shard that nobody has."""
    with database.transaction() as session:
        taken = claim(session, shard_id, holder=holder, lease_s=lease_s)
    assert taken is not None
    return taken


def answers(seqs: Iterable[int], *, outcome: Outcome = Outcome.SUCCEEDED) -> list[JobResult]:
    """A result of 3 prompt and 2 completion tokens for each."""
    return [
        JobResult(
            seq=seq,
            outcome=outcome,
            status_code=200,
            response=f'{{"answer":{seq}}}',
            usage=Usage(prompt_tokens=3, completion_tokens=2),
        )
        for seq in seqs
    ]


def shards_of(database: Database, batch_id: UUID) -> list[StoredShard]:
    """The batch's shards by id."""
    with database.transaction() as session:
        rows = session.execute(
            text("""
            SELECT id, seqs, state, fence, crashes, done, failed, truncated, empty, completion_tokens
            FROM shards WHERE batch_id = :id ORDER BY id"""),
            {"id": batch_id},
        ).all()
    return [StoredShard(shard_id, tuple(seqs), *rest) for shard_id, seqs, *rest in rows]


def results_of(database: Database, batch_id: UUID) -> list[StoredResult]:
    """The batch's results in input order."""
    with database.transaction() as session:
        rows = session.execute(
            text("""
            SELECT seq, outcome, status_code, response, error_code, error_message, engine_id
            FROM results WHERE batch_id = :id ORDER BY seq"""),
            {"id": batch_id},
        ).all()
    return [StoredResult(*row) for row in rows]


def batch_row(database: Database, batch_id: UUID) -> dict[str, Any]:
    """The batch's row by column."""
    with database.transaction() as session:
        return dict(session.execute(text("SELECT * FROM batches WHERE id = :id"), {"id": batch_id}).mappings().one())


def rows(database: Database, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """What a statement answers."""
    with database.transaction() as session:
        return [tuple(row) for row in session.execute(text(statement), values)]


def execute(database: Database, statement: str, **values: Any) -> None:
    """One statement by hand, for what a test must break or hasten."""
    with database.transaction() as session:
        session.execute(text(statement), values)
