"""SQL of token budgets: of a batch, and of a key for each day and month of UTC; what is spent and what is reserved.

Lock order: shard, budget, batch; several budgets in the order of their ids. An attempt's part of `reserved` is one row
a budget, stated as a whole each time, so that a step that is repeated after an ambiguous COMMIT changes nothing twice;
it goes in the transaction that moves the shard's fence. What is free, and for whom, is pipeline/budgets.py's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import BudgetPeriod
from store.budget_tables import TOKENS

if TYPE_CHECKING:
    from store.shards import Claim

UNLIMITED = 2**62  # a cap that was taken away, in rows of periods that had begun
BUDGETED = TOKENS.holds  # of a batch `b`: whether what its jobs take is counted


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


def open_batch_budget(session: Session, batch_id: UUID, tokens: int) -> None:
    """Let a batch that was not yet set going take so many tokens at most. Repeatable; the last call's cap holds."""
    TOKENS.open(session, batch_id, tokens)


def set_key_caps(session: Session, key_id: str, *, day_tokens: int | None, month_tokens: int | None) -> bool:
    """Set what a key may take, None for as much as it wants; holds at once, in the running day and month too.

    False: there is no such key. What was spent before counts, but for what attempts take that had begun uncounted.
    """
    found = TOKENS.set_caps(session, key_id, day=day_tokens, month=month_tokens)
    session.execute(
        text(f"""
        WITH held AS (
            SELECT u.id, p.cap FROM api_keys k {TOKENS.rows_of_key}
            WHERE k.id = :key ORDER BY u.id FOR NO KEY UPDATE OF u)
        UPDATE budgets b SET cap = coalesce(held.cap, :unlimited), waits_until = NULL
        FROM held WHERE b.id = held.id"""),
        {"key": key_id, "unlimited": UNLIMITED},
    )
    return found


def lock_budgets(session: Session, claim: Claim) -> list[HeldBudget]:
    """The budgets that hold for a claimed shard's batch now, locked; its key's new periods are begun.

    Lock the shard before. The key is held, so that its caps change before this or after, never in between.
    """
    return lock_again(session, claim, TOKENS.ids_for(session, claim.batch_id))


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
    rows = TOKENS.lock_of_key(session, key_id)
    budgets = [
        HeldBudget(id_, key, BudgetPeriod(period), cap, spent, reserved, own=0)
        for id_, key, period, cap, spent, reserved in rows
    ]
    if not budgets:
        return Taken()
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
