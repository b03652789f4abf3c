"""Summarize: a document that fits is summarized at once, a longer one by its parts, and then their summaries."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from documents.prompt import document_block
from models.jobs import JobResult
from models.states import Outcome
from pipeline.recipe import BYTES_A_TOKEN, NoOptions, Recipe, Task
from pipeline.steps import Reply

_PART: Final = "Summarize this part of a longer document: its facts, names and numbers, in a few sentences."
_JOIN: Final = "These are summaries of the parts of one document, in order. {instruction}"
_BETWEEN: Final = "\n\n"
_BETWEEN_TOKENS: Final = 2


async def _run(task: Task) -> JobResult:
    join = _JOIN.format(instruction=task.instruction)
    join_part = _JOIN.format(instruction=_PART)
    room = task.room_tokens(task.instruction, join, _PART, join_part)
    of_part = task.at_most(room // 2 - _BETWEEN_TOKENS)  # so that any two summaries fit into one request
    texts, level, cut_short = await task.parts(room), 0, 0
    while len(texts) > 1:
        replies = await asyncio.gather(
            *(
                task.ask(
                    f"part-{level}-{place}", document_block(text), instruction=join_part if level else _PART, **of_part
                )
                for place, text in enumerate(texts)
            )
        )
        groups = _grouped([reply for reply in replies if reply.text.strip()], most_tokens=room)
        cut_short += sum(reply.outcome is Outcome.TRUNCATED for reply in replies)
        cut_short += sum(len(group) for group in groups if _tokens(group) > room)
        texts, level = [_joined(group, most_tokens=room) for group in groups], level + 1
    reply = await task.ask(
        "summary", document_block(texts[0] if texts else ""), instruction=join if level else task.instruction
    )
    return task.ended(reply, {"parts_cut_short": cut_short} if cut_short else {})


def _grouped(summaries: Sequence[Reply], *, most_tokens: int) -> list[list[Reply]]:
    """The summaries in groups that fit, of two at least, so that there are fewer each time."""
    groups: list[list[Reply]] = []
    for one in summaries:
        if groups and (len(groups[-1]) < 2 or _tokens([*groups[-1], one]) <= most_tokens):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _joined(group: Sequence[Reply], *, most_tokens: int) -> str:
    """The group's text; two that do not fit, as an engine's that counts no tokens may not, are cut alike."""
    texts = [reply.text for reply in group]
    if _tokens(group) > most_tokens:
        most_bytes = most_tokens // len(group) * BYTES_A_TOKEN - len(_BETWEEN)
        texts = [text.encode()[:most_bytes].decode(errors="ignore") for text in texts]
    return _BETWEEN.join(texts)


def _tokens(replies: Sequence[Reply]) -> int:
    """As the engine counted them when it said them, else by their bytes."""
    return sum(
        (reply.usage.completion_tokens - reply.usage.reasoning_tokens or len(reply.text.encode()) // BYTES_A_TOKEN)
        + _BETWEEN_TOKENS
        for reply in replies
    )


RECIPE = Recipe(
    "summarize",
    "a summary of each document, of long ones by their parts",
    NoOptions,
    _run,
    instruction="Summarize the document in a few sentences.",
)
