"""Conversations: what the user says, turn after turn, each sent with all that was said before it.

A turn is a step of its job (pipeline/steps.py). What no longer fits into the window is left out of the prompt, oldest
turns first; the history that the result states is always whole. Passages that a turn is about are in that turn's
request alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import msgspec
from msgspec import Raw

from documents.prompt import citations
from models.jobs import Job, JobResult
from models.line_settings import LineSettings
from models.names import read_request_name, request_name
from models.states import Outcome
from pipeline.cached import Retrieval, WithPassages
from pipeline.lookups import NO_RETRIEVAL
from pipeline.steps import Reply, StepFailed, Steps
from runtime.errors import ServiceUnreachable, Transient
from store.database import Database
from store.results import find_stoker
from store.shards import Claim

TOKENS_PER_BYTE: Final = 1 / 3  # before the first reply: a high estimate for most languages and vocabularies
DIGEST_CHARACTERS: Final = 12
_ALWAYS_SENT: Final = frozenset({"system", "developer"})
_FROM_BEST: Final = (Outcome.SUCCEEDED, Outcome.TRUNCATED, Outcome.EMPTY)


async def converse(
    steps: Steps,
    job: Job,
    settings: LineSettings,
    claim: Claim,
    *,
    database: Database,
    window_tokens: int,
    retrieval: Retrieval | None = None,
) -> JobResult:
    """The job's result: the last turn's reply, and the whole history under `stoker.conversation`.

    Its outcome is the worst of its turns'. A reply that calls a tool ends it as failed: nobody here answers the call,
    and no turn could follow. One that is refused in the middle states the turns before. Raises what Steps.ask raises.
    """
    body, fields = _BODY.decode(job.body), _FIELDS.decode(job.body)
    earlier: Sequence[Raw] | None = ()
    if settings.conversation is not None:
        earlier = await _earlier(database, settings.conversation, tenant=claim.tenant)
    if earlier is None:
        message = f"there is no ended conversation {settings.conversation!r:.80}; its result line has the id"
        return steps.failed(code="conversation_not_found", message=message)
    history = _History([*earlier, *body.messages], room_tokens=window_tokens - body.output_tokens)
    name = request_name(claim.batch_id, job.seq)
    for turn in settings.turns or ():
        try:
            if settings.collection is not None:
                history.found.append(await _found(turn, job, claim, steps, retrieval))
            prompt = history.prompt(turn)
            reply = await steps.ask(history.step(prompt), {**fields, "messages": prompt})
            if reply.calls_tools:
                message = f"turn {history.turns + 1} was answered with a tool call, which nobody here answers"
                raise StepFailed(steps.failed(code="tool_calls_in_conversation", message=message))
        except StepFailed as error:
            raise StepFailed(replace(error.result, stoker=history.told(name))) from error
        history.add(turn, prompt, reply)
    return steps.result(reply, outcome=history.worst, stoker=history.told(name))


async def _found(turn: str, job: Job, claim: Claim, steps: Steps, retrieval: Retrieval | None) -> WithPassages:
    """The turn as a message with its passages. Raises StepFailed where they cannot be had, and Transient."""
    if retrieval is None:
        raise StepFailed(steps.failed(code="retrieval_unavailable", message=NO_RETRIEVAL))
    body = msgspec.json.encode({**_FIELDS.decode(job.body), "messages": [_message("user", turn)]}).decode()
    found = (await retrieval.retrieve(claim, [replace(job, body=body)]))[job.seq]
    if isinstance(found, Transient):
        raise found
    if isinstance(found, JobResult):
        raise StepFailed(steps.failed(code=found.error_code or "", message=found.error_message or ""))
    return found


class _History:
    """What was said, and how much of it goes into the next prompt. `found` are the turns with their passages."""

    def __init__(self, messages: Sequence[Raw], *, room_tokens: int) -> None:
        self.turns = 0
        self.worst = Outcome.SUCCEEDED
        self.found: list[WithPassages] = []
        self._citations: list[list[int]] = []
        self._messages = list(messages)
        self._roles = [_ROLE.decode(message).role for message in messages]
        self._dropped = 0
        self._room_tokens = room_tokens
        self._tokens_per_byte = TOKENS_PER_BYTE

    def step(self, prompt: Sequence[Raw]) -> str:
        """The next turn's name: also of what is asked, so that no reply to another history is taken for its own."""
        asked = hashlib.sha256(msgspec.json.encode(prompt)).hexdigest()[:DIGEST_CHARACTERS]
        return f"turn-{self.turns + 1}-{asked}"

    def prompt(self, turn: str) -> list[Raw]:
        """What is sent with a new turn: without the oldest turns, as few as need be.

        What was left out once stays out. System messages and the new turn never are: whether these fit is the
        engine's to say.
        """
        asked = _BODY.decode(self.found[-1].body).messages[0] if self.found else _message("user", turn)
        messages, roles = [*self._messages, asked], [*self._roles, "user"]
        starts = [place for place, role in enumerate(roles) if role == "user"]
        while True:
            first = starts[self._dropped] if self._dropped else 0
            sent = [
                message
                for place, (message, role) in enumerate(zip(messages, roles, strict=True))
                if place >= first or role in _ALWAYS_SENT
            ]
            if self._dropped == len(starts) - 1 or _size(sent) * self._tokens_per_byte <= self._room_tokens:
                return sent
            self._dropped += 1

    def add(self, turn: str, prompt: Sequence[Raw], reply: Reply) -> None:
        """A turn has ended: it and the reply are history."""
        answer = _message("assistant", reply.text)
        self._messages += [_message("user", turn), answer]
        self._roles += ["user", "assistant"]
        if self.found:
            self._citations.append(citations(reply.text, len(self.found[-1].told)))
        self.turns += 1
        self.worst = max(self.worst, reply.outcome, key=_FROM_BEST.index)
        if reply.usage.prompt_tokens:
            tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens - reply.usage.reasoning_tokens
            self._tokens_per_byte = tokens / (_size(prompt) + len(answer))

    def told(self, name: str) -> str:
        """The member of a result line's `stoker` that states it."""
        conversation = {
            "id": name,
            "turns": self.turns,
            "dropped_turns": self._dropped,
            "messages": self._messages,
        }
        if self.found:
            shown = [one.told for one in self.found[: self.turns]]
            conversation |= {"passages": shown, "citations": self._citations}
        return msgspec.json.encode({"conversation": conversation}).decode()


class _Body(msgspec.Struct):
    messages: list[Raw] = []
    max_completion_tokens: int | None = None
    max_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 0


class _Role(msgspec.Struct):
    role: str


class _Conversation(msgspec.Struct):
    messages: list[Raw]


class _Told(msgspec.Struct):
    conversation: _Conversation | None = None


_BODY = msgspec.json.Decoder(_Body)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_ROLE = msgspec.json.Decoder(_Role)
_TOLD = msgspec.json.Decoder(_Told)


async def _earlier(database: Database, name: str, *, tenant: str) -> list[Raw] | None:
    """The messages of an ended conversation of this tenant; None if it has none with this id.

    Raises Transient while Postgres does not answer.
    """
    place = read_request_name(name)

    def find() -> str | None:
        with database.transaction() as session:
            return None if place is None else find_stoker(session, *place, tenant=tenant)

    try:
        stoker = await asyncio.to_thread(find)
    except ServiceUnreachable as error:
        raise Transient(str(error)) from error
    told = None if stoker is None else _TOLD.decode(stoker).conversation
    return None if told is None else told.messages


def _message(role: str, text: str) -> Raw:
    return Raw(msgspec.json.encode({"role": role, "content": text}))


def _size(messages: Sequence[Raw]) -> int:
    return sum(map(len, map(bytes, messages)))
