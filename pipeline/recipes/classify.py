"""Classify: one of given labels for a document; the engine can answer nothing else."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from models.jobs import JobResult
from pipeline.recipe import Recipe, Task, whole_or_first


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`labels` are the answers that are possible."""

    labels: Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(min_length=2, max_length=500)]

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: each may be there once")


class _Answer(msgspec.Struct):
    label: str


async def _run(task: Task) -> JobResult:
    labels = task.options.labels
    instruction = f"{task.instruction}\nLabels: {', '.join(labels)}"
    block, told = await whole_or_first(task, instruction)
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": labels}},
        "required": ["label"],
        "additionalProperties": False,
    }
    reply = await task.ask(
        "classify",
        block,
        instruction=instruction,
        response_format={"type": "json_schema", "json_schema": {"name": "label", "schema": schema, "strict": True}},
    )
    try:
        label = msgspec.json.decode(reply.text, type=_Answer).label
    except ValueError:
        label = ""
    if label not in labels:
        message = "the engine answered none of the labels: does it support response_format, and is max_tokens enough?"
        return task.steps.failed(code="invalid_label", message=message)
    return task.ended(reply, {"label": label, **told})


RECIPE = Recipe(
    "classify",
    "one of given labels for each document",
    Options,
    _run,
    instruction="Which label fits the document best?",
    max_tokens=64,
)
