"""What a recipe is: something done to one document, in one or more requests, each of which is done once.

A recipe is a module of pipeline/recipes with a RECIPE: its options and a coroutine that asks and ends. It must keep
nothing between two requests but what their replies say: after a crash it runs from its beginning, and finished
steps answer at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from documents.prompt import Source, document_block, put_in, question_of
from models.jobs import JobResult
from pipeline.steps import Reply, Steps
from runtime.errors import Permanent
from store.documents import DocumentText

BYTES_A_TOKEN: Final = 3  # of a prompt, at least, in most languages: a part that is too small costs one request more
FRAME_TOKENS: Final = 150  # of marks, rules and the chat template
LEAST_TOKENS: Final = 64  # of text in a request: with less, the window is too small for the recipe
DIGEST_CHARACTERS: Final = 12
_LIMITS: Final = ("max_completion_tokens", "max_tokens")  # of output; the newer one rules where both are given


class Search(Protocol):
    """Finds the passages of the recipe's document that a question is about."""

    async def __call__(self, question: str, *, top_k: int) -> Sequence[tuple[Source, Mapping[str, Any]]]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One recipe for one document. `fields` are the request's, its last user message the instruction."""

    seq: int
    steps: Steps
    fields: Mapping[str, Any]
    options: Any
    document: DocumentText
    window_tokens: int
    cut: Callable[[str, int], list[str]]
    search: Search

    @property
    def text(self) -> str:
        """The document's Markdown."""
        return self.document.markdown or ""

    @property
    def instruction(self) -> str:
        """What is to be done, in the user's words or the recipe's."""
        return question_of(self.fields)

    def room_tokens(self, *instructions: str) -> int:
        """How many tokens of text fit into a request with any of these instructions. Raises Permanent if too few do."""
        beside = max(len(msgspec.json.encode(self._asking("", one)["messages"])) for one in instructions)
        output: int = next((self.fields[name] for name in _LIMITS if self.fields.get(name)), 0)
        room = self.window_tokens - output - beside // BYTES_A_TOKEN - FRAME_TOKENS
        if room < LEAST_TOKENS:
            raise Permanent(
                f"a window of {self.window_tokens:,} tokens leaves {max(0, room):,} for the document beside the "
                f"instruction and {output:,} tokens of output; lower max_tokens or raise the window",
                code="window_too_small",
            )
        return room

    async def parts(self, tokens: int) -> list[str]:
        """The document's text in parts of so many tokens at most."""
        return await asyncio.to_thread(self.cut, self.text, tokens)

    def at_most(self, tokens: int) -> dict[str, int]:
        """The request's limits of output, none above so many tokens."""
        wishes = {name: self.fields[name] for name in _LIMITS if self.fields.get(name)}
        return {name: min(wish, tokens) for name, wish in (wishes or {"max_tokens": tokens}).items()}

    async def ask(self, step: str, block: str, *, instruction: str | None = None, **more: Any) -> Reply:
        """The reply to an instruction, else the user's, below a block of text; `more` are further fields.

        A step belongs to what it asks: if that changes, as with the document or the window, it is done again.
        """
        fields = {**self._asking(block, instruction), **more}
        digest = hashlib.sha256(msgspec.json.encode(fields["messages"])).hexdigest()[:DIGEST_CHARACTERS]
        return await self.steps.ask(f"{step}-{digest}", fields)

    def _asking(self, block: str, instruction: str | None) -> dict[str, Any]:
        return put_in(self.fields, block, question=instruction)

    def ended(self, reply: Reply, told: Mapping[str, Any]) -> JobResult:
        """The job's result: the last reply, and what is to be told beside it."""
        return self.steps.result(reply, stoker=msgspec.json.encode(told).decode())


@dataclass(frozen=True, slots=True)
class Recipe:
    """`options` is a msgspec Struct; `instruction` what is asked, and `max_tokens` of answer, unless the user says.

    With `needs_passages` its documents must be in a collection.
    """

    name: str
    summary: str
    options: type[msgspec.Struct]
    run: Callable[[Task], Awaitable[JobResult]]
    instruction: str = ""
    max_tokens: int = 256
    needs_passages: bool = False


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a recipe that has none."""


async def whole_or_first(task: Task, instruction: str) -> tuple[str, dict[str, Any]]:
    """A block of the document's text as far as it fits above an instruction, and what to tell if not all does."""
    room = task.room_tokens(instruction)
    begun = task.text[: 2 * room * BYTES_A_TOKEN]  # no more can fit: a character has a byte at least
    parts = await asyncio.to_thread(task.cut, begun, room)
    is_whole = len(parts) <= 1 and len(begun) == len(task.text)
    first = next(iter(parts), "")
    return document_block(first), {} if is_whole else {"read_characters": len(first), "characters": len(task.text)}
