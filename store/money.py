"""SQL of budgets of money: what priced endpoints may cost a batch, and a key in a day and a month of UTC; in nanos.

Lock order: shard, budgets of tokens, of money, batch; several budgets in the order of their ids. What an attempt has
reserved and spent is one row a budget, stated as a whole each time, so that a step which is repeated after an ambiguous
COMMIT changes nothing twice. What there is room for is pipeline/purse.py's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import BudgetPeriod
from store.budget_tables import MONEY

if TYPE_CHECKING:
    from store.shards import Claim

PAID = MONEY.holds  # of a batch `b`: whether priced endpoints may be paid for it


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

    @property
    def unspent(self) -> int:
        """What it has for a request at the most, once nothing else is reserved."""
        return self.cap - self.spent

    @property
    def free(self) -> int:
        """What may be reserved now."""
        return self.unspent - self.reserved


def open_batch_money(session: Session, batch_id: UUID, nanos: int) -> None:
    """Let a batch spend so much at most. Repeatable; the last call's cap holds."""
    MONEY.open(session, batch_id, nanos)


def set_key_money(session: Session, key_id: str, *, day_money: int | None, month_money: int | None) -> bool:
    """Set what a key may spend, in nanos; None: no such budget. Holds at once, in the running day and month too.

    False: there is no such key. Where a budget is taken away, attempts that took from it go on within its last cap.
    """
    found = MONEY.set_caps(session, key_id, day=day_money, month=month_money)
    session.execute(
        text(f"""
        WITH held AS (
            SELECT u.id, p.cap FROM api_keys k {MONEY.rows_of_key}
            WHERE k.id = :key AND p.cap IS NOT NULL ORDER BY u.id FOR NO KEY UPDATE OF u)
        UPDATE money_budgets b SET cap = held.cap FROM held WHERE b.id = held.id"""),
        {"key": key_id},
    )
    return found


def lock_money(session: Session, claim: Claim) -> list[HeldMoney]:
    """The budgets that hold for a claimed shard's batch now, locked; its key's new periods are begun.

    Lock the shard before. The key is held, so that its caps change before this or after, never in between.
    """
    return lock_money_again(session, claim, MONEY.ids_for(session, claim.batch_id))


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


def lock_money_of_key(session: Session, key_id: str) -> list[HeldMoney]:
    """The budgets of money that a key has now, locked, for a request that is in no batch; its new periods are begun."""
    rows = MONEY.lock_of_key(session, key_id)
    return [
        HeldMoney(id_, key, BudgetPeriod(period), cap, spent, reserved, own_spent=0, own_reserved=0)
        for id_, key, period, cap, spent, reserved in rows
    ]


def add_money(session: Session, budget_ids: Sequence[int], *, reserved: int, spent: int) -> None:
    """So much more is reserved and spent of each of these; below zero, less. No attempt holds it: not repeatable."""
    session.execute(
        text("""
        WITH held AS (
            SELECT id FROM money_budgets WHERE id = ANY(CAST(:ids AS int8[])) ORDER BY id FOR NO KEY UPDATE)
        UPDATE money_budgets u SET reserved = greatest(0, u.reserved + :reserved), spent = u.spent + :spent
        FROM held WHERE u.id = held.id"""),
        {"ids": list(budget_ids), "reserved": reserved, "spent": spent},
    )


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
