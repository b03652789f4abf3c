"""SQL of token budgets: of a batch, and of a key for each day and month of UTC; what is spent and what is reserved.

Lock order: shard, budget, batch; several budgets in the order of their ids. An attempt's part of `reserved` is one row
a budget, stated as a whole each time, so that a step that is repeated after an ambiguous COMMIT changes nothing twice;
it goes in the transaction that moves the shard's fence. What is free, and for whom, is pipeline/budgets.py's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import BudgetPeriod

if TYPE_CHECKING:
    from store.shards import Claim

UNLIMITED = 2**62  # a cap that was taken away, in rows of periods that had begun
# Of a batch `b`: whether what its jobs take is counted.
BUDGETED = """(EXISTS (SELECT FROM budgets WHERE batch_id = b.id) OR b.key_id IS NOT NULL AND EXISTS (
    SELECT FROM api_keys WHERE id = b.key_id AND coalesce(day_tokens, month_tokens) IS NOT NULL))"""
# A key's caps `p` in their periods at this moment, which is one in the whole transaction.
_PERIODS = """CROSS JOIN LATERAL (VALUES ('day', date_trunc('day', now(), 'UTC'), k.day_tokens),
    ('month', date_trunc('month', now(), 'UTC'), k.month_tokens)) AS p (period, began_at, cap)"""
_ROW_OF_PERIOD = "u.key_id = k.id AND u.batch_id IS NULL AND u.period = p.period AND u.began_at = p.began_at"


@dataclass(frozen=True, slots=True)
class HeldBudget:
    """A budget as it stands under this transaction's lock; `own` is the attempt's part of `reserved`."""

    id: int
    key_id: str | None
    period: BudgetPeriod
    cap: int
    spent: int
    reserved: int
    own: int

    @property
    def unspent(self) -> int:
        """What it has for a job at the most, once nothing else is reserved; below zero where a cap was lowered."""
        return self.cap - self.spent

    @property
    def free(self) -> int:
        """What may be reserved now."""
        return self.cap - self.spent - self.reserved


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A budget as it is shown: of a key's running period, or of a batch."""

    key_id: str | None
    key_name: str | None
    batch_id: UUID | None
    period: BudgetPeriod
    began_at: datetime
    cap: int
    spent: int
    reserved: int


def open_batch_budget(session: Session, batch_id: UUID, tokens: int) -> None:
    """Let a batch that was not yet set going take so many tokens at most. Repeatable; the last call's cap holds."""
    session.execute(
        text("""
        INSERT INTO budgets (batch_id, period, began_at, cap)
        SELECT id, 'batch', created_at, :tokens FROM batches WHERE id = :batch
        ON CONFLICT ON CONSTRAINT uq_budgets_owner DO UPDATE SET cap = excluded.cap"""),
        {"batch": batch_id, "tokens": tokens},
    )


def set_key_caps(session: Session, key_id: str, *, day_tokens: int | None, month_tokens: int | None) -> bool:
    """Set what a key may take, None for as much as it wants; holds at once, in the running day and month too.

    False: there is no such key. What was spent before counts, but for what attempts take that had begun uncounted.
    """
    found = session.execute(
        text("UPDATE api_keys SET day_tokens = :day, month_tokens = :month WHERE id = :key RETURNING 1"),
        {"key": key_id, "day": day_tokens, "month": month_tokens},
    ).one_or_none()
    session.execute(
        text(f"""
        WITH held AS (
            SELECT u.id, p.cap FROM api_keys k {_PERIODS} JOIN budgets u ON {_ROW_OF_PERIOD}
            WHERE k.id = :key ORDER BY u.id FOR NO KEY UPDATE OF u)
        UPDATE budgets b SET cap = coalesce(held.cap, :unlimited), waits_until = NULL
        FROM held WHERE b.id = held.id"""),
        {"key": key_id, "unlimited": UNLIMITED},
    )
    return found is not None


def lock_budgets(session: Session, claim: Claim) -> list[HeldBudget]:
    """The budgets that hold for a claimed shard's batch now, locked; its key's new periods are begun.

    Lock the shard before. The key is held, so that its caps change before this or after, never in between.
    """
    session.execute(
        text("SELECT 1 FROM api_keys WHERE id = (SELECT key_id FROM batches WHERE id = :batch) FOR SHARE"),
        {"batch": claim.batch_id},
    )
    session.execute(
        text(f"""
        INSERT INTO budgets (key_id, period, began_at, cap)
        SELECT k.id, p.period, p.began_at, p.cap FROM batches b JOIN api_keys k ON k.id = b.key_id {_PERIODS}
        WHERE b.id = :batch AND p.cap IS NOT NULL AND NOT EXISTS (SELECT FROM budgets u WHERE {_ROW_OF_PERIOD})
        ORDER BY p.period ON CONFLICT DO NOTHING"""),
        {"batch": claim.batch_id},
    )
    ids = session.scalars(
        text(f"""
        SELECT id FROM budgets WHERE batch_id = :batch UNION ALL
        SELECT u.id FROM batches b JOIN api_keys k ON k.id = b.key_id {_PERIODS} JOIN budgets u ON {_ROW_OF_PERIOD}
        WHERE b.id = :batch AND p.cap IS NOT NULL"""),
        {"batch": claim.batch_id},
    ).all()
    return lock_again(session, claim, ids)


def lock_again(session: Session, claim: Claim, budget_ids: Sequence[int]) -> list[HeldBudget]:
    """These budgets, locked: an attempt settles where it has reserved, though the day has changed meanwhile."""
    rows = session.execute(
        text("""
        SELECT u.id, u.key_id, u.period, u.cap, u.spent, u.reserved, coalesce(r.amount, 0) FROM budgets u
        LEFT JOIN reservations r ON r.shard_id = :shard AND r.budget_id = u.id AND r.fence = :fence
        WHERE u.id = ANY(CAST(:ids AS int8[])) ORDER BY u.id FOR NO KEY UPDATE OF u"""),
        {"shard": claim.shard_id, "fence": claim.fence, "ids": list(budget_ids)},
    ).all()
    return [HeldBudget(id_, key_id, BudgetPeriod(period), *rest) for id_, key_id, period, *rest in rows]


@dataclass(frozen=True, slots=True)
class Taken:
    """The budgets that tokens were taken of; or, if one was `short`, that one, and nothing was taken."""

    budget_ids: tuple[int, ...] = ()
    short: HeldBudget | None = None


def take_of_key(session: Session, key_id: str, tokens: int) -> Taken:
    """Spend so much of all budgets that a key has now, for a request that is in no batch; its new periods are begun.

    Not repeatable: after an ambiguous COMMIT it may be spent twice.
    """
    caps = session.execute(
        text("""
        SELECT 1 FROM api_keys WHERE id = :key AND coalesce(day_tokens, month_tokens) IS NOT NULL FOR SHARE"""),
        {"key": key_id},
    ).one_or_none()
    if caps is None:
        return Taken()
    session.execute(
        text(f"""
        INSERT INTO budgets (key_id, period, began_at, cap)
        SELECT k.id, p.period, p.began_at, p.cap FROM api_keys k {_PERIODS}
        WHERE k.id = :key AND p.cap IS NOT NULL AND NOT EXISTS (SELECT FROM budgets u WHERE {_ROW_OF_PERIOD})
        ORDER BY p.period ON CONFLICT DO NOTHING"""),
        {"key": key_id},
    )
    rows = session.execute(
        text(f"""
        SELECT u.id, u.key_id, u.period, u.cap, u.spent, u.reserved, 0 FROM api_keys k {_PERIODS}
        JOIN budgets u ON {_ROW_OF_PERIOD}
        WHERE k.id = :key AND p.cap IS NOT NULL ORDER BY u.id FOR NO KEY UPDATE OF u"""),
        {"key": key_id},
    ).all()
    budgets = [HeldBudget(id_, key, BudgetPeriod(period), *rest) for id_, key, period, *rest in rows]
    least = min(budgets, key=lambda budget: budget.free)
    if least.free < tokens:
        return Taken(short=least)
    ids = tuple(budget.id for budget in budgets)
    give_back(session, ids, -tokens)
    return Taken(ids)


def give_back(session: Session, budget_ids: Sequence[int], tokens: int) -> None:
    """So much less is spent than was taken of these; below zero, more."""
    session.execute(
        text("""
        WITH held AS (
            SELECT id FROM budgets WHERE id = ANY(CAST(:ids AS int8[])) ORDER BY id FOR NO KEY UPDATE)
        UPDATE budgets u SET spent = greatest(0, u.spent - :tokens),
            waits_until = CASE WHEN :tokens <= 0 THEN u.waits_until END
        FROM held WHERE u.id = held.id"""),
        {"ids": list(budget_ids), "tokens": tokens},
    )


def settle(session: Session, claim: Claim, budget_ids: Sequence[int], *, reserved: int, spent: int) -> None:
    """Reserve so much in each of these budgets from now on, all in all, for this attempt, and charge what was spent.

    Lock the shard before, and see that its fence stands. Whether it fits is the caller's to know, under the budgets'
    locks, if it is more than before: here nothing is refused, for what was spent is spent.
    """
    session.execute(
        text("""
        WITH held AS (
            SELECT id FROM budgets WHERE id = ANY(CAST(:ids AS int8[])) ORDER BY id FOR NO KEY UPDATE
        ), before AS (
            SELECT budget_id, amount FROM reservations WHERE shard_id = :shard AND fence = :fence
        ), now AS (
            INSERT INTO reservations (shard_id, budget_id, fence, amount) SELECT :shard, id, :fence, :reserved FROM held
            ON CONFLICT (shard_id, budget_id) DO UPDATE SET fence = excluded.fence, amount = excluded.amount)
        UPDATE budgets u SET spent = u.spent + :spent, reserved = u.reserved + :reserved - coalesce(before.amount, 0),
            waits_until = CASE WHEN :reserved >= coalesce(before.amount, 0) THEN u.waits_until END
        FROM held LEFT JOIN before ON before.budget_id = held.id WHERE u.id = held.id"""),
        {
            "shard": claim.shard_id,
            "fence": claim.fence,
            "ids": list(budget_ids),
            "reserved": reserved,
            "spent": spent,
        },
    )


def release(session: Session, shard_ids: Sequence[int]) -> None:
    """Give up what attempts of these shards have reserved; in the transaction that moved their fences."""
    session.execute(
        text("""
        WITH gone AS (
            DELETE FROM reservations WHERE shard_id = ANY(CAST(:shards AS int8[])) RETURNING budget_id, amount
        ), freed AS (SELECT budget_id, CAST(sum(amount) AS int8) AS amount FROM gone GROUP BY budget_id
        ), held AS (
            SELECT id FROM budgets WHERE id IN (SELECT budget_id FROM freed) ORDER BY id FOR NO KEY UPDATE)
        UPDATE budgets u SET reserved = u.reserved - freed.amount,
            waits_until = CASE WHEN freed.amount = 0 THEN u.waits_until END
        FROM held JOIN freed ON freed.budget_id = held.id WHERE u.id = held.id"""),
        {"shards": list(shard_ids)},
    )


def postpone(session: Session, budget_ids: Sequence[int], *, wait_s: float) -> None:
    """Send out no shard that takes from these budgets for a while, or until something of them is free again."""
    session.execute(
        text("""
        UPDATE budgets SET waits_until = clock_timestamp() + make_interval(secs => :wait_s)
        WHERE id = ANY(CAST(:ids AS int8[]))"""),
        {"ids": list(budget_ids), "wait_s": wait_s},
    )


def budgets_of(session: Session, tenant: str) -> list[BudgetReport]:
    """The tenant's budgets: of its keys in the running periods, then of its batches that have not ended."""
    return _reports(session, "b.tenant = :tenant AND b.ended_at IS NULL", "k.tenant = :tenant", {"tenant": tenant})


def budgets_of_batch(session: Session, batch_id: UUID) -> list[BudgetReport]:
    """The budgets that a batch takes from: its key's in the running periods, and its own."""
    of_key = "k.id = (SELECT key_id FROM batches WHERE id = :batch)"
    return _reports(session, "b.id = :batch", of_key, {"batch": batch_id})


def _reports(session: Session, of_batch: str, of_key: str, values: dict[str, str | UUID]) -> list[BudgetReport]:
    rows = session.execute(
        text(f"""
        (SELECT k.id, k.name, CAST(NULL AS uuid), p.period, p.began_at, p.cap, coalesce(u.spent, 0),
            coalesce(u.reserved, 0)
        FROM api_keys k {_PERIODS} LEFT JOIN budgets u ON {_ROW_OF_PERIOD}
        WHERE {of_key} AND p.cap IS NOT NULL AND k.revoked_at IS NULL ORDER BY k.name, k.id, p.period)
        UNION ALL
        (SELECT b.key_id, k.name, b.id, u.period, u.began_at, u.cap, u.spent, u.reserved
        FROM budgets u JOIN batches b ON b.id = u.batch_id LEFT JOIN api_keys k ON k.id = b.key_id
        WHERE {of_batch} AND b.deleted_at IS NULL ORDER BY b.id)"""),
        values,
    ).all()
    return [BudgetReport(row[0], row[1], row[2], BudgetPeriod(row[3]), *row[4:]) for row in rows]
