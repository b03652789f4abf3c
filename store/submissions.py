"""SQL of submit: a batch that is being validated, its jobs and shards, and the step that sets it going.

A validating batch belongs to the process that fills it while its lease holds; nothing else reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from struct import Struct
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, Integer, bindparam, delete, insert, text
from sqlalchemy.orm import Session

from models.lines import ParsedLine
from models.rows import Batch, Follower, Job
from models.states import BatchState, Priority
from runtime.errors import LostFence
from store.arrays import Int4s
from store.database import copy_cursor
from store.notifications import wake_dispatch

# One COPY block. Binary blocks were measured at 0.7 µs of client CPU a row (386-byte bodies), text blocks at
# 1.2, write_row at 1.7; with Postgres's own work 260,000 rows/s against 146,000 and 104,000.
BLOCK_BYTES = 256 * 1024

_KEYED = "key:"  # begins the digest of a submit that states a key

_COPY_JOBS = "COPY jobs (batch_id, seq, custom_id, body, stoker) FROM STDIN (FORMAT BINARY)"
_COPY_START = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"
_ROW_START = Struct(">hi16s")  # five fields; the first has 16 bytes, the batch's id
_SEQ_AND_LENGTH = Struct(">iii")
_LENGTH = Struct(">i")
_NULL = b"\xff\xff\xff\xff"


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch as submit begins it. `options` is kept for the manifest."""

    id: UUID
    tenant: str
    endpoint: str
    input_name: str
    input_digest: str
    submit_digest: str
    options: dict[str, Any]
    max_output_tokens: int | None
    priority: Priority = Priority.NORMAL
    weight: float = 1.0
    retry_of: UUID | None = None
    fence: int = 0  # of the validator that holds a batch of the gateway
    key_id: str | None = None  # whose budgets it takes from
    request: dict[str, Any] | None = None  # its create body, where the gateway began it


@dataclass(frozen=True, slots=True)
class Filled:
    """What a validating batch holds: its jobs, and the shards that are not done.

    `skipped` counts bad lines that were left out, `taken` jobs whose results came from another batch, `followers` those
    that wait for an equal job's result. `options` is what was found out for the batch's own, `notices` for its
    submitter.
    """

    total: int
    open_shards: int
    skipped: int = 0
    taken: int = 0
    followers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SameSubmit:
    """An earlier batch of the same file and options, or of the same key: `asked` is the digest of those then."""

    id: UUID
    total: int
    skipped: int
    taken: int
    followers: int
    asked: str | None


def digest_of_key(key: str) -> str:
    """What stands in the place of a submit's digest where an idempotency key says which submits are the same."""
    return _KEYED + hashlib.sha256(key.encode()).hexdigest()


def find_same_submit(
    session: Session, *, tenant: str, submit_digest: str, younger_than: timedelta
) -> SameSubmit | None:
    """The newest batch of this submit that runs or was completed; one that ends otherwise does not count.

    Of a key it is the batch of that key, however it ended and whenever it was.
    """
    row = session.execute(
        text(
            "SELECT id, total, skipped, coalesce(CAST(options ->> 'reused' AS int4), 0) AS taken, followers, "
            "options ->> 'asked' AS asked "
            "FROM batches WHERE tenant = :tenant AND submit_digest = :digest AND deleted_at IS NULL "
            "AND state <> 'validating' AND (:keyed OR (state IN ('in_progress', 'finalizing', 'completed') "
            "AND coalesce(ending, 'completed') = 'completed' "
            "AND created_at > clock_timestamp() - :age)) ORDER BY id DESC LIMIT 1"
        ),
        {
            "tenant": tenant,
            "digest": submit_digest,
            "age": younger_than,
            "keyed": submit_digest.startswith(_KEYED),
        },
    ).one_or_none()
    return None if row is None else SameSubmit(*row)


def batch_of_key(session: Session, key: str, *, tenant: str) -> UUID | None:
    """The batch that was submitted with this idempotency key, however it ended; None if there is none, or not yet."""
    found = find_same_submit(session, tenant=tenant, submit_digest=digest_of_key(key), younger_than=timedelta())
    return None if found is None else found.id


def lock_submit(session: Session, *, tenant: str, submit_digest: str) -> None:
    """Hold, to the end of the transaction, the right to set this submit going; others of the same wait."""
    session.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"{tenant}\n{submit_digest}"}
    )


def insert_validating(session: Session, batch: NewBatch, *, lease: timedelta) -> None:
    """Begin a batch: validating, without jobs, ours while the lease holds."""
    session.execute(
        insert(Batch).values(
            id=batch.id,
            tenant=batch.tenant,
            state=BatchState.VALIDATING,
            endpoint=batch.endpoint,
            input_name=batch.input_name,
            input_digest=batch.input_digest,
            submit_digest=batch.submit_digest,
            options=batch.options,
            max_output_tokens=batch.max_output_tokens,
            priority=batch.priority,
            weight=batch.weight,
            retry_of=batch.retry_of,
            key_id=batch.key_id,
            request=batch.request,
            lease_until=text("clock_timestamp() + :lease").bindparams(lease=lease),
        )
    )


def extend_lease(session: Session, batch: NewBatch, *, lease: timedelta) -> None:
    """Keep the validating batch; to the end of the transaction nobody else can take it.

    Raises LostFence when it is gone: its lease had run out, or it was cancelled.
    """
    _expect_ours(
        session.scalar(
            text(
                "UPDATE batches SET lease_until = clock_timestamp() + :lease "
                "WHERE id = :batch AND fence = :fence AND state = 'validating' AND ending IS NULL RETURNING 1"
            ),
            {"batch": batch.id, "fence": batch.fence, "lease": lease},
        ),
        batch.id,
    )


def copy_jobs(session: Session, lines: Iterable[ParsedLine], *, batch_id: UUID, first_seq: int) -> int:
    """Store the lines as jobs, numbered from `first_seq`; return how many. An error in `lines` ends it."""
    row_start = _ROW_START.pack(5, 16, batch_id.bytes)
    pack_seq, pack_length = _SEQ_AND_LENGTH.pack, _LENGTH.pack
    seq = first_seq
    with copy_cursor(session).copy(_COPY_JOBS) as copy:
        parts, size = [_COPY_START], 0
        for line in lines:
            custom_id, body, stoker = line.custom_id.encode(), line.body, line.stoker
            end = _NULL if stoker is None else pack_length(len(stoker)) + stoker
            parts += (row_start, pack_seq(4, seq, len(custom_id)), custom_id, pack_length(len(body)), body, end)
            seq += 1
            size += len(body)
            if size >= BLOCK_BYTES:
                copy.write(b"".join(parts))
                parts, size = [], 0
        copy.write(b"".join([*parts, _COPY_END]))
    return seq - first_seq


def insert_shards(
    session: Session, spans: Sequence[tuple[int, int, int]], *, batch_id: UUID, seqs: Sequence[int] | None = None
) -> None:
    """Cut shards, one for each (first, last, tokens) span, with ids in their order.

    Spans are of places in `seqs`, from 0; without it they are seqs themselves.
    """
    span = "generate_series(first, last)" if seqs is None else "unnest((CAST(:seqs AS int4[]))[first + 1 : last + 1])"
    session.execute(
        text(
            f"INSERT INTO shards (batch_id, seqs, tokens) SELECT :batch, ARRAY(SELECT {span}), tokens "
            "FROM unnest(:firsts, :lasts, :tokens) WITH ORDINALITY AS span (first, last, tokens, place) ORDER BY place"
        ).bindparams(
            bindparam("firsts", type_=ARRAY(Integer)),
            bindparam("lasts", type_=ARRAY(Integer)),
            bindparam("tokens", type_=ARRAY(BigInteger)),
        ),
        {
            "batch": batch_id,
            "firsts": [first for first, _, _ in spans],
            "lasts": [last for _, last, _ in spans],
            "tokens": [tokens for _, _, tokens in spans],
            **({} if seqs is None else {"seqs": Int4s(seqs)}),
        },
    )


def set_going(session: Session, batch: NewBatch, filled: Filled, *, window: timedelta) -> None:
    """Validating → in_progress, and wake dispatch at commit. Raises LostFence when the batch is gone.

    Its window began with its creation where that was answered before; else it begins now.

    A batch with no shard to run is finalizing at once; the leader ends it like any other.
    """
    _expect_ours(
        session.scalar(
            text(
                "UPDATE batches SET total = :total, shards_left = :shards, skipped = :skipped, "
                "state = CASE WHEN :shards = 0 THEN 'finalizing' ELSE 'in_progress' END, "
                "finalizing_at = CASE WHEN :shards = 0 THEN clock_timestamp() END, "
                "options = options || CAST(:options AS jsonb), max_output_tokens = :most, lease_until = NULL, "
                "in_progress_at = clock_timestamp(), expires_at = coalesce(expires_at, clock_timestamp() + :window) "
                "WHERE id = :batch AND fence = :fence AND state = 'validating' AND ending IS NULL RETURNING 1"
            ),
            {
                "batch": batch.id,
                "fence": batch.fence,
                "most": batch.max_output_tokens,
                "total": filled.total,
                "shards": filled.open_shards,
                "skipped": filled.skipped,
                "options": json.dumps(
                    {**batch.options, **({"reused": filled.taken} if filled.taken else {}), **filled.options}
                ),
                "window": window,
            },
        ),
        batch.id,
    )
    wake_dispatch(session)


def delete_validating(session: Session, batch_id: UUID) -> bool:
    """Delete a batch that was never set going, with jobs and shards; False if there is none. Repeatable."""
    gone = session.scalar(
        text("DELETE FROM batches WHERE id = :batch AND state = 'validating' RETURNING id"), {"batch": batch_id}
    )
    if gone is not None:
        session.execute(delete(Job).where(Job.batch_id == gone))
        session.execute(delete(Follower).where(Follower.batch_id == gone))
    return gone is not None


def delete_abandoned_batches(session: Session) -> list[UUID]:
    """Delete the validating batches whose lease is over, with jobs and shards; return their ids.

    One that the gateway has answered for stays: another validator takes it. Those that a submit is writing to at this
    moment are locked by it, and left alone. Locks are kept to the end of the transaction; it may be repeated and may
    run in several processes at once.
    """
    abandoned = session.scalars(
        text(
            "SELECT id FROM batches WHERE state = 'validating' AND input_file_id IS NULL "
            "AND lease_until < clock_timestamp() FOR UPDATE SKIP LOCKED"
        )
    ).all()
    return [batch_id for batch_id in abandoned if delete_validating(session, batch_id)]


def _expect_ours(found: object, batch_id: UUID) -> None:
    if found is None:
        raise LostFence(
            f"batch {batch_id} is no longer ours: it was cancelled, or stood still longer than its lease; submit again"
        )
