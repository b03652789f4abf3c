"""SQL of budgets of money: what priced endpoints may cost a batch, and a key in a day and a month of UTC; in nanos.

Lock order: shard, budgets of tokens, of money, batch; several budgets in the order of their ids. What an attempt has
reserved and spent is one row a budget, stated as a whole each time, so that a step which is repeated after an ambiguous
COMMIT changes nothing twice. What there is room for is pipeline/purse.py's to say.
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

# Of a batch `b`: whether priced endpoints may be paid for it.
PAID = """(EXISTS (SELECT FROM money_budgets WHERE batch_id = b.id) OR b.key_id IS NOT NULL AND EXISTS (
    SELECT FROM api_keys WHERE id = b.key_id AND coalesce(day_money, month_money) IS NOT NULL))"""
# A key's caps `p` in their periods at this moment, which is one in the whole transaction.
_PERIODS = """CROSS JOIN LATERAL (VALUES ('day', date_trunc('day', now(), 'UTC'), k.day_money),
    ('month', date_trunc('month', now(), 'UTC'), k.month_money)) AS p (period, began_at, cap)"""
_ROW_OF_PERIOD = "u.key_id = k.id AND u.batch_id IS NULL AND u.period = p.period AND u.began_at = p.began_at"


@dataclass(frozen=True, slots=True)
class HeldMoney:
    """A budget of money as it stands under this transaction's lock; `own_*` are the attempt's parts of its amounts."""

    id: int
    key_id: str | None
    period: BudgetPeriod
    cap: int
    spent: int
    reserved: int
    own_spent: int
    own_reserved: int


@dataclass(frozen=True, slots=True)
class MoneyReport:
    """A budget of money as it is shown: of a key's running period, or of a batch."""

    key_id: str | None
    key_name: str | None
    batch_id: UUID | None
    period: BudgetPeriod
    began_at: datetime
    cap: int
    spent: int
    reserved: int


def open_batch_money(session: Session, batch_id: UUID, nanos: int) -> None:
    """Let a batch spend so much at most. Repeatable; the last call's cap holds."""
    session.execute(
        text("""
        INSERT INTO money_budgets (batch_id, period, began_at, cap)
        SELECT id, 'batch', created_at, :nanos FROM batches WHERE id = :batch
        ON CONFLICT ON CONSTRAINT uq_money_budgets_owner DO UPDATE SET cap = excluded.cap"""),
        {"batch": batch_id, "nanos": nanos},
    )


def set_key_money(session: Session, key_id: str, *, day_money: int | None, month_money: int | None) -> bool:
    """Set what a key may spend, in nanos; None: no such budget. Holds at once, in the running day and month too.

    False: there is no such key. Where a budget is taken away, attempts that took from it go on within its last cap.
    """
    found = session.execute(
        text("UPDATE api_keys SET day_money = :day, month_money = :month WHERE id = :key RETURNING 1"),
        {"key": key_id, "day": day_money, "month": month_money},
    ).one_or_none()
    session.execute(
        text(f"""
        WITH held AS (
            SELECT u.id, p.cap FROM api_keys k {_PERIODS} JOIN money_budgets u ON {_ROW_OF_PERIOD}
            WHERE k.id = :key AND p.cap IS NOT NULL ORDER BY u.id FOR NO KEY UPDATE OF u)
        UPDATE money_budgets b SET cap = held.cap FROM held WHERE b.id = held.id"""),
        {"key": key_id},
    )
    return found is not None


def lock_money(session: Session, claim: Claim) -> list[HeldMoney]:
    """The budgets that hold for a claimed shard's batch now, locked; its key's new periods are begun.

    Lock the shard before. The key is held, so that its caps change before this or after, never in between.
    """
    session.execute(
        text("SELECT 1 FROM api_keys WHERE id = (SELECT key_id FROM batches WHERE id = :batch) FOR SHARE"),
        {"batch": claim.batch_id},
    )
    session.execute(
        text(f"""
        INSERT INTO money_budgets (key_id, period, began_at, cap)
        SELECT k.id, p.period, p.began_at, p.cap FROM batches b JOIN api_keys k ON k.id = b.key_id {_PERIODS}
        WHERE b.id = :batch AND p.cap IS NOT NULL AND NOT EXISTS (
            SELECT FROM money_budgets u WHERE {_ROW_OF_PERIOD})
        ORDER BY p.period ON CONFLICT DO NOTHING"""),
        {"batch": claim.batch_id},
    )
    ids = session.scalars(
        text(f"""
        SELECT id FROM money_budgets WHERE batch_id = :batch UNION ALL
        SELECT u.id FROM batches b JOIN api_keys k ON k.id = b.key_id {_PERIODS}
        JOIN money_budgets u ON {_ROW_OF_PERIOD} WHERE b.id = :batch AND p.cap IS NOT NULL"""),
        {"batch": claim.batch_id},
    ).all()
    return lock_money_again(session, claim, ids)


def lock_money_again(session: Session, claim: Claim, budget_ids: Sequence[int]) -> list[HeldMoney]:
    """These budgets, locked: an attempt settles where it has reserved, though the day has changed meanwhile."""
    rows = session.execute(
        text("""
        SELECT u.id, u.key_id, u.period, u.cap, u.spent, u.reserved, coalesce(r.spent, 0), coalesce(r.amount, 0)
        FROM money_budgets u LEFT JOIN money_reservations r
            ON r.shard_id = :shard AND r.budget_id = u.id AND r.fence = :fence
        WHERE u.id = ANY(CAST(:ids AS int8[])) ORDER BY u.id FOR NO KEY UPDATE OF u"""),
        {"shard": claim.shard_id, "fence": claim.fence, "ids": list(budget_ids)},
    ).all()
    return [HeldMoney(id_, key_id, BudgetPeriod(period), *rest) for id_, key_id, period, *rest in rows]


def state_money(
    session: Session, claim: Claim, budget_ids: Sequence[int], *, reserved: int, spent: int, requests: int
) -> None:
    """From now on this attempt has reserved and spent so much of each of these budgets, all in all.

    Lock the shard before, and see that its fence stands. Whether it fits is the caller's to know, under the budgets'
    locks, if more is reserved than before: what was spent is spent.
    """
    session.execute(
        text("""
        WITH held AS (
            SELECT id FROM money_budgets WHERE id = ANY(CAST(:ids AS int8[])) ORDER BY id FOR NO KEY UPDATE
        ), before AS (
            SELECT budget_id, amount, spent FROM money_reservations WHERE shard_id = :shard AND fence = :fence
        ), now AS (
            INSERT INTO money_reservations (shard_id, budget_id, fence, amount, spent, requests)
            SELECT :shard, id, :fence, :reserved, :spent, :requests FROM held
            ON CONFLICT (shard_id, budget_id) DO UPDATE SET
                fence = excluded.fence, amount = excluded.amount, spent = excluded.spent, requests = excluded.requests)
        UPDATE money_budgets u SET spent = u.spent + :spent - coalesce(before.spent, 0),
            reserved = u.reserved + :reserved - coalesce(before.amount, 0)
        FROM held LEFT JOIN before ON before.budget_id = held.id WHERE u.id = held.id"""),
        {
            "shard": claim.shard_id,
            "fence": claim.fence,
            "ids": list(budget_ids),
            "reserved": reserved,
            "spent": spent,
            "requests": requests,
        },
    )


def release_money(session: Session, shard_ids: Sequence[int], *, is_spent: bool = False) -> None:
    """Give up what attempts of these shards have reserved; in the transaction that moved their fences.

    `is_spent`: they have died, and what they had asked for is billed.
    """
    session.execute(
        text("""
        WITH gone AS (
            DELETE FROM money_reservations WHERE shard_id = ANY(CAST(:shards AS int8[])) RETURNING budget_id, amount
        ), freed AS (SELECT budget_id, CAST(sum(amount) AS int8) AS amount FROM gone GROUP BY budget_id
        ), held AS (
            SELECT id FROM money_budgets WHERE id IN (SELECT budget_id FROM freed) ORDER BY id FOR NO KEY UPDATE)
        UPDATE money_budgets u SET reserved = u.reserved - freed.amount,
            spent = u.spent + CASE WHEN :is_spent THEN freed.amount ELSE 0 END
        FROM held JOIN freed ON freed.budget_id = held.id WHERE u.id = held.id"""),
        {"shards": list(shard_ids), "is_spent": is_spent},
    )


def take_spill(session: Session, batch_id: UUID) -> bool:
    """Take one of the jobs that a batch may yet send to priced endpoints; false if there are none."""
    taken = session.execute(
        text("UPDATE batches SET spill = spill - 1 WHERE id = :batch AND spill > 0 RETURNING 1"), {"batch": batch_id}
    ).one_or_none()
    return taken is not None


def money_of(session: Session, tenant: str) -> list[MoneyReport]:
    """The tenant's budgets of money: of its keys in the running periods, then of its batches that have not ended."""
    return _reports(session, "b.tenant = :tenant AND b.ended_at IS NULL", "k.tenant = :tenant", {"tenant": tenant})


def money_of_batch(session: Session, batch_id: UUID) -> list[MoneyReport]:
    """The budgets of money that a batch takes from: its key's in the running periods, and its own."""
    of_key = "k.id = (SELECT key_id FROM batches WHERE id = :batch)"
    return _reports(session, "b.id = :batch", of_key, {"batch": batch_id})


def _reports(session: Session, of_batch: str, of_key: str, values: dict[str, str | UUID]) -> list[MoneyReport]:
    rows = session.execute(
        text(f"""
        (SELECT k.id, k.name, CAST(NULL AS uuid), p.period, p.began_at, p.cap, coalesce(u.spent, 0),
            coalesce(u.reserved, 0)
        FROM api_keys k {_PERIODS} LEFT JOIN money_budgets u ON {_ROW_OF_PERIOD}
        WHERE {of_key} AND p.cap IS NOT NULL AND k.revoked_at IS NULL ORDER BY k.name, k.id, p.period)
        UNION ALL
        (SELECT b.key_id, k.name, b.id, u.period, u.began_at, u.cap, u.spent, u.reserved
        FROM money_budgets u JOIN batches b ON b.id = u.batch_id LEFT JOIN api_keys k ON k.id = b.key_id
        WHERE {of_batch} AND b.deleted_at IS NULL ORDER BY b.id)"""),
        values,
    ).all()
    return [MoneyReport(row[0], row[1], row[2], BudgetPeriod(row[3]), *row[4:]) for row in rows]
