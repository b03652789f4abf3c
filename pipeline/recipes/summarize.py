"""Summarize: a document that fits is summarized at once, a longer one by its parts, and then their summaries."""

from __future__ import annotations

import asyncio
from typing import Final

from documents.prompt import document_block
from models.jobs import JobResult
from models.states import Outcome
from pipeline.recipe import BYTES_A_TOKEN, NoOptions, Recipe, Task

_PART: Final = "Summarize this part of a longer document: its facts, names and numbers, in a few sentences."
_JOIN: Final = "These are summaries of the parts of one document, in order. {instruction}"


async def _run(task: Task) -> JobResult:
    texts, level, cut_short = task.parts(), 0, 0
    while len(texts) > 1:
        last = _JOIN.format(instruction=_PART)
        replies = await asyncio.gather(
            *(
                task.ask(f"part-{level}-{place}", document_block(text), instruction=last if level else _PART)
                for place, text in enumerate(texts)
            )
        )
        cut_short += sum(reply.outcome is Outcome.TRUNCATED for reply in replies)
        said = [reply.text for reply in replies if reply.text.strip()]
        texts, level = _packed(said, most_bytes=task.room_tokens * BYTES_A_TOKEN), level + 1
    instruction = _JOIN.format(instruction=task.instruction) if level else None
    reply = await task.ask("summary", document_block(texts[0] if texts else ""), instruction=instruction)
    return task.ended(reply, {"parts_cut_short": cut_short} if cut_short else {})


def _packed(texts: list[str], *, most_bytes: int) -> list[str]:
    """The texts joined in groups, of two at least, so that there are fewer each time; one that is too long is cut."""
    groups: list[list[str]] = []
    for text in texts:
        size = sum(len(one.encode()) + 2 for one in groups[-1]) if groups else 0
        if groups and (len(groups[-1]) < 2 or size + len(text.encode()) <= most_bytes):
            groups[-1].append(text)
        else:
            groups.append([text])
    return ["\n\n".join(group).encode()[:most_bytes].decode(errors="ignore") for group in groups]


RECIPE = Recipe(
    "summarize",
    "a summary of each document, of long ones by their parts",
    NoOptions,
    _run,
    instruction="Summarize the document in a few sentences.",
)
