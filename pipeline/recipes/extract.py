"""Extract: fields of a document as JSON of a given schema, validated, with one repair before a stated error."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from documents.prompt import document_block
from models.jobs import JobResult
from pipeline.forms import answer_schema
from pipeline.recipe import Recipe, Task, whole_or_first

_REPAIR: Final = (
    "{instruction}\n\nThe second text is your last answer and what is wrong with it. Answer with valid JSON."
)


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`schema` is a JSON schema of an object."""

    schema: dict[str, Any]

    def __post_init__(self) -> None:
        if self.schema.get("type") != "object":
            raise ValueError('schema: must be of "type": "object", with the fields as its properties')
        answer_schema(msgspec.json.encode(self.schema))


async def _run(task: Task) -> JobResult:
    schema = task.options.schema
    held = answer_schema(msgspec.json.encode(schema))
    block, told = await whole_or_first(task, task.instruction)
    structured = {"type": "json_schema", "json_schema": {"name": "extraction", "schema": schema, "strict": True}}
    reply = await task.ask("extract", block, response_format=structured)
    if (fault := held.fault(reply.text)) is None:
        return task.ended(reply, told)
    instruction = _REPAIR.format(instruction=task.instruction)
    again = document_block(f"{reply.text}\n\n{fault}")  # both say what the document made the engine say: data too
    block, told = await whole_or_first(task, f"{again}\n\n{instruction}")
    block = f"{block}\n\n{again}"
    reply = await task.ask("repair", block, instruction=instruction, response_format=structured)
    if (fault := held.fault(reply.text)) is None:
        return task.ended(reply, {**told, "repaired": True})
    return task.steps.failed(code="invalid_extraction", message=f"no valid JSON, also after one repair: {fault}")


RECIPE = Recipe(
    "extract",
    "fields of each document, as JSON of a schema",
    Options,
    _run,
    instruction="Extract the fields from the document. Answer with JSON only.",
    max_tokens=512,
)
