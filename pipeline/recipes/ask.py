"""Ask: a question answered from the passages of each document that it is about, with citations."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from documents.prompt import citations, fitting, passages_block
from models.jobs import JobResult
from models.line_settings import MOST_PASSAGES
from pipeline.recipe import Recipe, Task
from runtime.errors import Permanent


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`top_k` passages at most are shown to the engine."""

    top_k: Annotated[int, Meta(ge=1, le=MOST_PASSAGES)] = 8


async def _run(task: Task) -> JobResult:
    found = await task.search(task.instruction, top_k=task.options.top_k)
    if not found:
        raise Permanent("the document has no passages: add it to a collection, and name it there", code="no_passages")
    room = task.room_tokens(task.instruction)
    chosen = [found[place] for place in fitting([source for source, _ in found], tokens=room)]
    if not chosen:
        raise Permanent("no passage of the document fits into the window", code="window_too_small")
    reply = await task.ask("answer", passages_block([source for source, _ in chosen]))
    listed = [{"n": number, **told} for number, (_, told) in enumerate(chosen, 1)]
    return task.ended(reply, {"passages": listed, "citations": citations(reply.text, len(chosen))})


RECIPE = Recipe("ask", "a question answered from each document, with citations", Options, _run, needs_passages=True)
