"""Money for priced endpoints while a shard runs: nothing is asked before the most that it may cost is reserved.

Budgets count what endpoints bill, not what results hold: an answer that was lost is paid for too. What one attempt has
reserved and spent is stated as a whole each time, by one thread at a time; after an ambiguous commit the next statement
makes it good (docs/decisions/0032).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from models.endpoints import Prices
from models.money import plain
from models.names import batch_name
from models.states import BudgetPeriod
from pipeline.budgets import BudgetExceeded, bounds_of
from runtime.errors import LostFence, ServiceUnreachable
from runtime.logs import get_logger
from store.database import Database, Session
from store.money import HeldMoney, lock_money, lock_money_again, state_money, take_spill
from store.shards import Claim, hold_shard

log = get_logger(__name__)

LEAST_NANOS: Final = 1  # of a request to a priced endpoint that would cost nothing: there is no payment of 0


class Purse:
    """What one attempt may pay; it is the `Payer` of all its requests. The loop's thread calls `pay` and `ended`."""

    def __init__(self, database: Database, claim: Claim, *, most_output: int) -> None:
        self._database = database
        self._claim = claim
        self._most_output = most_output
        self._budget_ids: list[int] = []
        self._open = self._requests = self._spent = 0
        self._stating = threading.Lock()  # through each transaction that states the whole; never by the loop's thread
        self._lock = threading.Lock()  # of the sums, for moments
        self._turn = asyncio.Lock()  # one thread at a time is enough

    async def pay(self, prices: Prices, path: str, body: bytes, *, spills: bool) -> int:
        """Reserve the most that a request may cost: how many nanos; 0 where waiting may help.

        `spills`: own endpoints serve it too, so it takes one of the jobs that the batch must send away to end in time.
        Raises BudgetExceeded where a budget can never pay it, unless own endpoints can do it.
        """
        prompt_tokens, output_tokens = bounds_of(body, path, most_output=self._most_output)
        nanos = max(LEAST_NANOS, prices.most_nanos(prompt_tokens=prompt_tokens, output_tokens=output_tokens))
        async with self._turn:
            reserving = asyncio.ensure_future(asyncio.to_thread(self._reserve, nanos, spills=spills))
            try:
                return nanos if await asyncio.shield(reserving) else 0
            except ServiceUnreachable as error:
                log.warning("payment_waits", error=str(error))
                return 0
            except asyncio.CancelledError:  # the thread goes on, and nobody will send what it pays for
                reserving.add_done_callback(partial(self._unwanted, nanos))
                raise

    def ended(self, reserved: int, *, spent: int) -> None:
        """A request is over for which so much was reserved, and this is what it has cost."""
        with self._lock:
            self._open -= reserved
            self._requests -= 1
            self._spent += spent

    @contextmanager
    def stating(self) -> Iterator[None]:
        """Around the transaction that calls `settle`."""
        with self._stating:
            yield

    def settle(self, session: Session) -> None:
        """State what is reserved and spent by now, under the fence; raises LostFence if it is lost."""
        if not self._budget_ids:
            return  # nothing was ever reserved
        if not hold_shard(session, self._claim):
            raise LostFence
        self._state(session, self._budget_ids, more=0)

    def _reserve(self, nanos: int, *, spills: bool) -> bool:
        with self._stating:
            with self._database.transaction() as session:
                if not hold_shard(session, self._claim):
                    return False
                if self._budget_ids:
                    budgets = lock_money_again(session, self._claim, self._budget_ids)
                else:
                    budgets = lock_money(session, self._claim)
                if not self._has_room(budgets, nanos, spills=spills):
                    return False
                if spills and not take_spill(session, self._claim.batch_id):
                    return False
                ids = [budget.id for budget in budgets]
                self._state(session, ids, more=nanos)
            self._budget_ids = ids  # not before: a period that was begun here goes with a rollback
            with self._lock:  # before anybody else states the whole
                self._open += nanos
                self._requests += 1
        return True

    def _unwanted(self, nanos: int, reserving: asyncio.Future[bool]) -> None:
        if not reserving.cancelled() and reserving.exception() is None and reserving.result():
            self.ended(nanos, spent=0)

    def _has_room(self, budgets: list[HeldMoney], nanos: int, *, spills: bool) -> bool:
        """Whether each of them has so much beside what is reserved and spent, this attempt's newest sums included."""
        if not budgets and not spills:
            raise BudgetExceeded(
                f"bills tokens, and {batch_name(self._claim.batch_id)} has no budget of money any more: "
                "a new batch may have one, with --budget-money"
            )
        with self._lock:
            own_reserved, own_spent = self._open, self._spent
        has_room = bool(budgets)
        for budget in budgets:  # all of them: the first may be full for now, and a later one for good
            spent = budget.spent - budget.own_spent + own_spent
            if nanos > budget.cap - spent and not spills:
                raise BudgetExceeded(self._refusal(nanos, budget, spent))
            reserved = budget.reserved - budget.own_reserved + own_reserved
            has_room &= nanos <= budget.cap - spent - reserved
        return has_room

    def _state(self, session: Session, budget_ids: Sequence[int], *, more: int) -> None:
        with self._lock:
            reserved, spent, requests = self._open + more, self._spent, self._requests + bool(more)
        state_money(session, self._claim, budget_ids, reserved=reserved, spent=spent, requests=requests)

    def _refusal(self, nanos: int, budget: HeldMoney, spent: int) -> str:
        name = f"the {budget.period} budget of key {budget.key_id}"
        remedy = f"raise it with `stoker keys limit {budget.key_id} --money-per-{budget.period} N`"
        if budget.period is BudgetPeriod.BATCH:
            name = "the batch's budget of money"
            remedy = f"`stoker retry {batch_name(self._claim.batch_id)} --budget-money N` has one of its own"
        left, cap = max(0, budget.cap - spent), budget.cap
        return f"may cost up to {plain(nanos)}, but {name} has {plain(left)} left of {plain(cap)}; {remedy}"
