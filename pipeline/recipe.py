"""What a recipe is: something done to one document, in one or more requests, each of which is done once.

A recipe is a module of pipeline/recipes with a RECIPE: its options and a coroutine that asks and ends. It must keep
nothing between two requests but what their replies say: after a crash it runs from its beginning, and finished
steps answer at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from documents.prompt import Source, document_block, question_of
from models.jobs import JobResult
from pipeline.steps import Reply, Steps
from runtime.errors import Permanent
from store.documents import DocumentText

BYTES_A_TOKEN: Final = 3  # of a prompt, at least, in most languages: a part that is too small costs one request more
FRAME_TOKENS: Final = 150  # of marks, rules and the chat template
LEAST_TOKENS: Final = 64  # of text in a request: with less, the window is too small for the recipe
DIGEST_CHARACTERS: Final = 8


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

    @property
    def room_tokens(self) -> int:
        """How many tokens of text fit into one request. Raises Permanent if they are too few."""
        messages = sum(len(msgspec.json.encode(message)) for message in self.fields["messages"])
        output: int = self.fields.get("max_completion_tokens") or self.fields.get("max_tokens") or 0
        room = self.window_tokens - output - messages // BYTES_A_TOKEN - FRAME_TOKENS
        if room < LEAST_TOKENS:
            raise Permanent(
                f"a window of {self.window_tokens:,} tokens leaves {max(0, room):,} for the document beside the "
                f"instruction and {output:,} tokens of output; lower max_tokens or raise the window",
                code="window_too_small",
            )
        return room

    def parts(self) -> list[str]:
        """The document's text in parts, each of which fits into one request."""
        return self.cut(self.text, self.room_tokens)

    async def ask(self, step: str, block: str, *, instruction: str | None = None, **more: Any) -> Reply:
        """The reply to the instruction below a block of text; `more` are further fields of the request.

        Steps belong to the document's text: if that changes, they are done again.
        """
        *before, last = self.fields["messages"]
        said = {**last, "content": f"{block}\n\n{instruction or self.instruction}"}
        digest = (self.document.text_digest or "")[:DIGEST_CHARACTERS]
        return await self.steps.ask(f"{step}-{digest}", {**self.fields, "messages": [*before, said], **more})

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


def whole_or_first(task: Task) -> tuple[str, dict[str, Any]]:
    """A block of the document's text as far as it fits into one request, and what to tell if it does not."""
    parts = task.parts()
    if len(parts) <= 1:
        return document_block(task.text), {}
    return document_block(parts[0]), {"read_characters": len(parts[0]), "characters": len(task.text)}
