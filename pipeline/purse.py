"""Money for priced endpoints, of a shard that runs or of a single request: nothing is asked before it is reserved.

Budgets count what endpoints bill, not what results hold: an answer that was lost is paid for too. What one attempt has
reserved and spent is stated as a whole each time, by one thread at a time; after an ambiguous commit the next statement
makes it good (docs/decisions/0032).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from models.endpoints import Prices
from models.money import plain
from models.names import batch_name
from models.states import BudgetPeriod
from pipeline.budgets import BudgetExceeded, bounds_of
from runtime.errors import LostFence, ServiceUnreachable, Transient
from runtime.logs import get_logger
from store.database import Database, Session
from store.money import (
    HeldMoney,
    add_money,
    lock_money,
    lock_money_again,
    lock_money_of_key,
    state_money,
    take_spill,
)
from store.shards import Claim, hold_shard

log = get_logger(__name__)

OWN_FIRST_S: Final = 3.0  # chosen: a client waits, and pays rather than queue for an engine that is full
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
        nanos = _most_nanos(prices, path, body, most_output=self._most_output)
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
        left = budget.cap - spent
        if budget.period is not BudgetPeriod.BATCH:
            return _short_of_key(nanos, budget, left)
        remedy = f"`stoker retry {batch_name(self._claim.batch_id)} --budget-money N` has one of its own"
        return _short(nanos, "the batch's budget of money", left, budget.cap, remedy)


class KeyPurse:
    """What a key pays for one single request; it is the `Payer` of it, in the loop's thread.

    The most is reserved first, and `settle` makes of it what it has cost. No attempt holds it: who dies in between
    leaves it reserved until the day or month is over, so that a budget is never exceeded.
    """

    def __init__(self, database: Database, key_id: str, *, most_output: int) -> None:
        self._database = database
        self._key_id = key_id
        self._most_output = most_output
        self._began = time.monotonic()
        self._reserving: asyncio.Future[bool] | None = None
        self._budget_ids: list[int] = []
        self._reserved = self._spent = 0

    async def pay(self, prices: Prices, path: str, body: bytes, *, spills: bool) -> int:
        """Reserve the most that it may cost: how many nanos; 0 where waiting may help.

        `spills`: own endpoints serve it too, and have the first seconds. Raises BudgetExceeded where it is too much,
        and Transient without Postgres.
        """
        if spills and time.monotonic() < self._began + OWN_FIRST_S:
            return 0
        await self.settle()  # of an endpoint before, perhaps of another day
        nanos = _most_nanos(prices, path, body, most_output=self._most_output)
        self._reserving = asyncio.ensure_future(asyncio.to_thread(self._reserve, nanos))
        try:
            has_room = await asyncio.shield(self._reserving)  # `settle` knows of it if we are cancelled here
        except ServiceUnreachable as error:
            raise Transient(str(error)) from error
        return nanos if has_room else 0

    def ended(self, reserved: int, *, spent: int) -> None:
        """A request is over, and this is what it has cost."""
        del reserved
        self._spent += spent

    async def settle(self) -> None:
        """Nothing is reserved any more, and what was billed is spent; what Postgres does not hear of stays reserved."""
        if self._reserving is None:
            return
        await asyncio.gather(self._reserving, return_exceptions=True)
        self._reserving = None
        reserved, spent, self._reserved, self._spent = self._reserved, self._spent, 0, 0
        if not reserved:
            return
        try:
            await asyncio.to_thread(self._state, reserved, spent)
        except ServiceUnreachable as error:
            log.warning("payment_not_settled", key=self._key_id, error=str(error))

    def _reserve(self, nanos: int) -> bool:
        with self._database.transaction() as session:
            budgets = lock_money_of_key(session, self._key_id)
            if not budgets:
                raise BudgetExceeded(
                    f"bills tokens, and key {self._key_id} has no budget of money: "
                    f"`stoker keys limit {self._key_id} --money-per-day N` gives it one"
                )
            for budget in budgets:
                if nanos > budget.unspent:
                    raise BudgetExceeded(_short_of_key(nanos, budget, budget.unspent))
            if any(nanos > budget.free for budget in budgets):
                return False
            ids = [budget.id for budget in budgets]
            add_money(session, ids, reserved=nanos, spent=0)
        self._budget_ids, self._reserved = ids, nanos
        return True

    def _state(self, reserved: int, spent: int) -> None:
        with self._database.transaction() as session:
            add_money(session, self._budget_ids, reserved=-reserved, spent=spent)


def _most_nanos(prices: Prices, path: str, body: bytes, *, most_output: int) -> int:
    prompt_tokens, output_tokens = bounds_of(body, path, most_output=most_output)
    return max(LEAST_NANOS, prices.most_nanos(prompt_tokens=prompt_tokens, output_tokens=output_tokens))


def _short_of_key(nanos: int, budget: HeldMoney, left: int) -> str:
    remedy = f"raise it with `stoker keys limit {budget.key_id} --money-per-{budget.period} N`"
    return _short(nanos, f"the {budget.period} budget of key {budget.key_id}", left, budget.cap, remedy)


def _short(nanos: int, name: str, left: int, cap: int, remedy: str) -> str:
    return f"may cost up to {plain(nanos)}, but {name} has {plain(max(0, left))} left of {plain(cap)}; {remedy}"
