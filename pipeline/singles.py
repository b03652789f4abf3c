"""What single requests cost: charged to the key's token budgets before they run, and counted once they are answered.

There is no attempt that could reserve: the most that a request may take is spent first, and what it did not take is
given back. A gateway that dies in between leaves it spent, so a budget is never exceeded.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.singles import SingleAnswer
from pipeline.budgets import BudgetExceeded, bound_of, tokens_of
from store.budgets import give_back, take_of_key
from store.database import Session
from store.usage import add_usage


@dataclass(frozen=True, slots=True)
class Charge:
    """What was taken, of which budgets; none where the key has no caps."""

    tokens: int
    budget_ids: tuple[int, ...] = ()


def charge_single(session: Session, *, key_id: str, path: str, body: bytes, most_output: int) -> Charge:
    """Take the most that a request may need. Raises BudgetExceeded with the remedy if a budget has not so much."""
    tokens = bound_of(body, path, most_output=most_output)
    taken = take_of_key(session, key_id, tokens)
    if taken.short is not None:
        budget = taken.short
        raise BudgetExceeded(
            f"may take up to {tokens:,} tokens, but the {budget.period} budget of key {key_id} has "
            f"{max(0, budget.free):,} free of {budget.cap:,}; wait, ask for less, or raise it with `stoker keys limit "
            f"{key_id} --tokens-per-{budget.period} N`"
        )
    return Charge(tokens, taken.budget_ids)


def settle_single(session: Session, charge: Charge, answer: SingleAnswer | None, *, tenant: str, key_id: str) -> None:
    """Give back what it did not take, and count what an engine has answered. None: it was not answered, and costs
    nothing, as a batch's jobs that came to nothing do."""
    used = 0 if answer is None else tokens_of(answer.usage)
    if charge.budget_ids and charge.tokens != used:
        give_back(session, charge.budget_ids, charge.tokens - used)
    if answer is None or answer.engine_id is None:
        return
    is_good = answer.code is None and answer.response is not None
    if is_good or answer.cost:
        add_usage(
            session,
            tenant=tenant,
            key_id=key_id,
            engine_id=answer.engine_id,
            usage=answer.usage,
            cost=answer.cost or 0,
        )
