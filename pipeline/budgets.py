"""Token budgets while a shard runs: nothing is asked before the most that it may take is reserved (decision 0023).

The most is known from the request's bytes. What is reserved of one attempt is stated as a whole each time, by one
thread at a time, and what has been answered is charged in the transaction that writes it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Raw

from models.jobs import Job, JobResult, Usage, failed
from models.line_settings import read_settings
from models.names import batch_name
from models.states import BudgetPeriod
from runtime.errors import Permanent, ServiceUnreachable, Transient
from runtime.logs import get_logger
from store.budgets import UNLIMITED, HeldBudget, lock_again, lock_budgets, postpone, settle
from store.database import Database, Session
from store.shards import Claim, hold_shard, write_and_tell
from store.steps import FinishedStep, charge_steps

log = get_logger(__name__)

CODE: Final = "budget_exceeded"
WAIT_S: Final = 1.0  # between two looks at a budget that is all reserved; as often as the dispatcher sweeps
# A token is a byte of the prompt at the least. What templates add to a message, role and marks, has fewer tokens than
# the JSON of the message has bytes beside its content; this is for those that say more.
MESSAGE_TOKENS: Final = 8
REQUEST_TOKENS: Final = 512  # a template's own system prompt, its preamble of tools: the longest known have some 400
INPUT_TOKENS: Final = 16  # a text's special tokens, and the rounding of its share in a pack's usage
MEDIA_TOKENS: Final = 16_384  # the most that Qwen2-VL's processor makes of one image; others make fewer


class BudgetExceeded(Permanent):
    """What is to be asked can never be paid from what a budget has left."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=CODE)


class BudgetWaits(Transient):
    """What is to be asked cannot be paid before others give up what they have reserved."""


@dataclass(frozen=True, slots=True)
class Funding:
    """What became of jobs that wished to run: `jobs` are paid for, `refused` ones never can be, the rest may later."""

    jobs: list[Job]
    refused: list[JobResult]
    waiting: list[Job]


@dataclass(slots=True)
class Cover:
    """A request that is paid for; say what it took."""

    tokens: int = 0


def bound_of(body: str | bytes, endpoint: str, *, most_output: int) -> int:
    """The most tokens that a request can take, prompt and output; `most_output` of one completion if it states none."""
    return sum(bounds_of(body, endpoint, most_output=most_output))


def bounds_of(body: str | bytes, endpoint: str, *, most_output: int) -> tuple[int, int]:
    """The same, (of the prompt, of the outputs)."""
    size = len(body) if isinstance(body, bytes) or body.isascii() else len(body.encode())
    asked = _READERS[endpoint](body)
    if isinstance(asked, _Embeddings):
        return size + INPUT_TOKENS * _count(asked.input), 0
    clamp = max(filter(None, (asked.max_tokens, asked.max_completion_tokens)), default=most_output)
    outputs = max(asked.n or 1, _number(asked.best_of)) * _count(asked.prompt)
    media = sum(map(_media_in, asked.messages))
    allowance = REQUEST_TOKENS + MESSAGE_TOKENS * len(asked.messages) + MEDIA_TOKENS * media
    # Templates write tools anew, indented: no more than as long again in tokens.
    return size + len(bytes(asked.tools)) + allowance, outputs * clamp


def charge_ahead(session: Session, claim: Claim, steps: Sequence[FinishedStep], *, lease_s: float) -> bool:
    """Write and charge steps that a dead attempt has left in Redis alone; False, and nothing, where that is too much.

    What it had reserved for them went with its fence.
    """
    if not hold_shard(session, claim):
        return False
    budgets = lock_budgets(session, claim)
    if sum(step.tokens for step in steps) > min((budget.free for budget in budgets), default=UNLIMITED):
        return False
    charged = charge_steps(session, claim, steps, lease_s=lease_s)
    settle(session, claim, [budget.id for budget in budgets], reserved=0, spent=charged or 0)
    return True


class Funds:
    """What one attempt has reserved, by job.

    `_stating` guards `_held` and is held through each transaction that states the whole of it in Postgres, never by the
    loop's thread; `_lock` guards the rest, for moments. After an ambiguous commit the next statement makes it good.
    """

    def __init__(self, database: Database, claim: Claim, *, most_output: int) -> None:
        self._database = database
        self._claim = claim
        self._most_output = most_output
        self._budget_ids: list[int] = []
        self._steps: Mapping[int, Collection[str]] = {}
        self._held: Counter[int] = Counter()
        self._asking: Counter[int] = Counter()  # bounds of requests in flight, of jobs that have several
        self._taken: Counter[int] = Counter()  # tokens of their answers that are not yet charged
        self._beside: Counter[int] = Counter()  # tokens of second answers, which no result has
        self._change = _Change((), ())
        self._stating = threading.Lock()
        self._lock = threading.Lock()

    def fund(self, jobs: Sequence[Job], steps: Mapping[int, Collection[str]]) -> Funding:
        """Reserve for jobs in their order, each that fits; `steps` has the finished ones of jobs of several requests.

        One that fits beside no others' waits; smaller ones behind it go first. Raises ServiceUnreachable.
        """
        self._steps = steps
        with self._stating:
            with self._database.transaction() as session:
                budgets = self._locked(session)
                if budgets is None:
                    return Funding([], [], list(jobs))
                chosen = self._choose(session, budgets, jobs, held=self._held.total())
            self._holds(chosen)
        return chosen.funding

    async def fund_soon(self, jobs: Sequence[Job], steps: Mapping[int, Collection[str]]) -> Funding:
        """The same from the loop's thread; while Postgres does not answer, all of them wait."""
        try:
            return await asyncio.to_thread(self.fund, jobs, steps)
        except ServiceUnreachable as error:
            log.warning("funding_waits", error=str(error))
            return Funding([], [], list(jobs))

    def _choose(
        self, session: Session, budgets: Sequence[HeldBudget], jobs: Sequence[Job], *, held: int, spent: int = 0
    ) -> _Chosen:
        """Reserve for those of the jobs that fit, beside what is `held` and what is now `spent`."""
        ids = [budget.id for budget in budgets]
        room, tight = _room(budgets, held + spent), _least(budgets)
        chosen, waiting = _Chosen(Funding([], [], []), {}, ids), UNLIMITED
        for job in jobs:
            bound = self._first_bound(job)
            if tight is not None and bound > tight.unspent - spent:
                message = self._refusal(bound, replace(tight, spent=tight.spent + spent))
                chosen.funding.refused.append(failed(job.seq, code=CODE, message=message))
            elif bound > room:
                chosen.funding.waiting.append(job)
                waiting = min(waiting, bound)
            else:
                chosen.funding.jobs.append(job)
                chosen.granted[job.seq] = bound
                room -= bound
        reserved = held + sum(chosen.granted.values())
        if chosen.granted or spent or held != max((budget.own for budget in budgets), default=held):
            settle(session, self._claim, ids, reserved=reserved, spent=spent)
        if chosen.funding.waiting and not reserved:
            full = [budget.id for budget in budgets if _room([budget], spent) < waiting]
            postpone(session, full, wait_s=WAIT_S)
        return chosen

    @asynccontextmanager
    async def covering(self, seq: int, body: str | bytes, *, taken: int = 0) -> AsyncIterator[Cover]:
        """Reserve what one more request of a job can take, beyond what the job has had; `taken` is what that took.

        Raises BudgetExceeded, BudgetWaits, and Transient while Postgres does not answer.
        """
        bound = bound_of(body, self._claim.endpoint, most_output=self._most_output)
        try:
            await asyncio.to_thread(self._extend, seq, bound, taken)
        except ServiceUnreachable as error:
            raise Transient(str(error)) from error
        cover = Cover()
        try:
            yield cover
        finally:
            with self._lock:
                self._asking[seq] -= bound
                self._taken[seq] += cover.tokens

    def add_beside(self, seq: int, tokens: int) -> None:
        """Charge so many tokens with the job's result that are not in it."""
        with self._lock:
            self._beside[seq] += tokens

    @contextmanager
    def stating(self, ended: Collection[int], steps: Sequence[FinishedStep]) -> Iterator[None]:
        """Around a transaction that calls `write` and then `settle`; `ended` jobs ask for nothing more."""
        with self._stating:
            self._change = _Change(ended, steps)
            yield
            self._held = self._left()
            if self._change.chosen is not None:
                self._holds(self._change.chosen)
            with self._lock:
                for step in steps:
                    self._taken[step.seq] -= step.tokens
                for counts in (self._asking, self._taken, self._beside):
                    for seq in ended:
                        counts.pop(seq, None)

    def write(
        self,
        session: Session,
        results: Sequence[JobResult],
        steps: Sequence[FinishedStep],
        *,
        engine_id: int | None,
        lease_s: float,
    ) -> bool:
        """Write results and steps under the fence, and see which of them are new; false if the fence is lost."""
        if results:
            inserted = write_and_tell(session, self._claim, results, engine_id=engine_id, lease_s=lease_s)
            if inserted is None:
                return False
            new = set(inserted)
            self._change.inserted = [result for result in results if result.seq in new]
        if steps:
            charged = charge_steps(session, self._claim, steps, lease_s=lease_s)
            if charged is None:
                return False
            self._change.charged = charged
        return True

    def settle(self, session: Session, charged_before: Mapping[int, int], unfunded: Sequence[Job]) -> None:
        """Charge what was really written, and reserve for jobs that wait what that leaves over; `go_on` has them.

        `charged_before` are tokens of jobs that ended, charged with their steps.

        This is the one place that says what a token costs: on own engines each that is in a result, once. On a priced
        endpoint, what an attempt had in flight when it died would be charged where its reservation is released.
        """
        spent = self._change.charged
        for result in self._change.inserted:
            tokens = tokens_of(result.usage) + self._beside[result.seq] - charged_before.get(result.seq, 0)
            spent += max(0, tokens)
            if tokens > self._held[result.seq]:
                log.error(
                    "budget_bound_broken",
                    batch_id=str(self._claim.batch_id),
                    seq=result.seq,
                    tokens=tokens,
                    bound=self._held[result.seq],
                )
        left = self._left().total()
        if not unfunded:
            settle(session, self._claim, self._budget_ids, reserved=left, spent=spent)
            return
        budgets = self._locked(session) or []
        self._change.chosen = self._choose(session, budgets, unfunded, held=left, spent=spent)

    def go_on(self) -> Funding | None:
        """What became of the jobs that waited at the last write, told once."""
        chosen, self._change.chosen = self._change.chosen, None
        return None if chosen is None else chosen.funding

    def _holds(self, chosen: _Chosen) -> None:
        """This is committed."""
        self._budget_ids = chosen.budget_ids
        self._held.update(chosen.granted)

    def _left(self) -> Counter[int]:
        """What stays reserved after the write, by job."""
        left = Counter({seq: held for seq, held in self._held.items() if seq not in self._change.ended})
        for step in self._change.steps:
            if step.seq in left:
                left[step.seq] = max(0, left[step.seq] - step.tokens)
        return left

    def _locked(self, session: Session) -> list[HeldBudget] | None:
        """The attempt's budgets under their locks; None if its fence is lost."""
        if not hold_shard(session, self._claim):
            return None
        if self._budget_ids:
            return lock_again(session, self._claim, self._budget_ids)
        return lock_budgets(session, self._claim)

    def _extend(self, seq: int, bound: int, taken: int) -> None:
        with self._stating:
            with self._lock:
                self._taken[seq] += taken
                uncharged = self._taken[seq]
                short = uncharged + self._asking[seq] + bound - self._held[seq]
            if short > 0:
                self._reserve(seq, short, least=uncharged + bound)
            with self._lock:
                self._asking[seq] += bound

    def _reserve(self, seq: int, more: int, *, least: int) -> None:
        """Reserve more for a job, which cannot go on with less than `least` in all."""
        with self._database.transaction() as session:
            budgets = self._locked(session)
            if budgets is None:
                raise BudgetWaits("its attempt is over")
            total = self._held.total()
            tight = _least(budgets)
            if tight is not None and least > tight.unspent:
                raise BudgetExceeded(self._refusal(least, tight))
            if more > _room(budgets, total):
                raise BudgetWaits("waits for tokens of a budget that others have reserved")
            settle(session, self._claim, [budget.id for budget in budgets], reserved=total + more, spent=0)
        self._held[seq] += more

    def _first_bound(self, job: Job) -> int:
        """What a job needs to begin; one that goes on reserves before each of its requests."""
        if self._steps.get(job.seq):
            return 0
        bound = bound_of(job.body, self._claim.endpoint, most_output=self._most_output)
        if job.seq in self._steps and (turns := read_settings(job.stoker or "{}").turns):
            bound += MESSAGE_TOKENS + len(turns[0].encode())
        return bound

    def _refusal(self, bound: int, budget: HeldBudget) -> str:
        name = f"the {budget.period} budget of key {budget.key_id}"
        remedy = f"raise it with `stoker keys limit {budget.key_id} --tokens-per-{budget.period} N`"
        if budget.period is BudgetPeriod.BATCH:
            name, remedy = "the batch's budget", "a new batch has one of its own"
        return (
            f"may take up to {bound:,} tokens, but {name} has {max(0, budget.unspent):,} left of {budget.cap:,} "
            f"({budget.spent:,} spent); {remedy}, then retry {batch_name(self._claim.batch_id)}"
        )


def tokens_of(usage: Usage) -> int:
    """What counts of an answer."""
    return usage.prompt_tokens + usage.completion_tokens


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What became of jobs, and what was reserved for those that may run, by seq."""

    funding: Funding
    granted: dict[int, int]
    budget_ids: list[int]


@dataclass(slots=True)
class _Change:
    """A write: what it says, and what of it was new in this transaction."""

    ended: Collection[int]
    steps: Sequence[FinishedStep]
    inserted: Sequence[JobResult] = ()
    charged: int = 0
    chosen: _Chosen | None = None


class _Message(msgspec.Struct):
    content: Raw = Raw(b"null")


class _Chat(msgspec.Struct):
    """Fields that were checked when the job was submitted, so that reading them cannot fail; others are raw."""

    prompt: ClassVar[Raw] = Raw(b"null")
    messages: list[_Message] = []
    tools: Raw = Raw(b"")
    best_of: Raw = Raw(b"null")
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _Completion(msgspec.Struct):
    messages: ClassVar[tuple[_Message, ...]] = ()
    tools: ClassVar[Raw] = Raw(b"")
    max_completion_tokens: ClassVar[int | None] = None
    prompt: Raw
    best_of: Raw = Raw(b"null")
    n: int | None = None
    max_tokens: int | None = None


class _Embeddings(msgspec.Struct):
    input: Raw


class _Part(msgspec.Struct):
    type: str | None = None


_READERS: Final[Mapping[str, Any]] = {
    "/v1/chat/completions": msgspec.json.Decoder(_Chat).decode,
    "/v1/completions": msgspec.json.Decoder(_Completion).decode,
    "/v1/embeddings": msgspec.json.Decoder(_Embeddings).decode,
}
_LIST: Final = msgspec.json.Decoder(list[Raw])
_PART: Final = msgspec.json.Decoder(_Part)


def _count(texts: Raw) -> int:
    """How many prompts these are: a text or a list of token ids is one."""
    if not bytes(texts).startswith(b"["):
        return 1
    found = _LIST.decode(texts)
    return len(found) if found and bytes(found[0])[:1] in (b'"', b"[") else 1


def _media_in(message: _Message) -> int:
    """How many of a message's parts are no text."""
    if not bytes(message.content).startswith(b"["):
        return 0
    return sum(not _is_text(part) for part in _LIST.decode(message.content))


def _is_text(part: Raw) -> bool:
    with suppress(msgspec.MsgspecError):
        return _PART.decode(part).type in ("text", "refusal")
    return False


def _number(value: Raw) -> int:
    with suppress(msgspec.MsgspecError):
        return msgspec.json.decode(value, type=int)
    return 1


def _least(budgets: Sequence[HeldBudget]) -> HeldBudget | None:
    """The budget that has the least left; None if none holds any more."""
    return min(budgets, key=lambda budget: budget.unspent, default=None)


def _room(budgets: Sequence[HeldBudget], held: int) -> int:
    """What an attempt that holds so much may reserve more."""
    return min((budget.free + budget.own - held for budget in budgets), default=UNLIMITED)
