"""Extract: fields of a document as JSON of a given schema, validated, with one repair before a stated error."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from jsonschema import Draft202012Validator, SchemaError

from models.jobs import JobResult
from pipeline.recipe import Recipe, Task, whole_or_first

MOST_SCHEMA_BYTES: Final = 32_768  # an engine compiles it to a grammar, without a limit of time
_REPAIR: Final = (
    "{instruction}\n\nYour last answer was not valid: {fault}\nIt was:\n{answer}\n\nAnswer again, with valid JSON."
)
_SHOWN: Final = 400  # characters of a fault


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`schema` is a JSON schema of an object."""

    schema: dict[str, Any]

    def __post_init__(self) -> None:
        try:
            Draft202012Validator.check_schema(self.schema)
        except SchemaError as error:
            raise ValueError(f"schema: {error.message[:_SHOWN]}; write a JSON schema (draft 2020-12)") from error
        if self.schema.get("type") != "object":
            raise ValueError('schema: must be of "type": "object", with the fields as its properties')
        if len(msgspec.json.encode(self.schema)) > MOST_SCHEMA_BYTES:
            raise ValueError(f"schema: has more than {MOST_SCHEMA_BYTES:,} bytes; ask for less at once")


async def _run(task: Task) -> JobResult:
    schema = task.options.schema
    block, told = whole_or_first(task)
    structured = {"type": "json_schema", "json_schema": {"name": "extraction", "schema": schema, "strict": True}}
    reply = await task.ask("extract", block, response_format=structured)
    if (fault := _fault(reply.text, schema)) is None:
        return task.ended(reply, told)
    instruction = _REPAIR.format(instruction=task.instruction, fault=fault, answer=reply.text)
    reply = await task.ask("repair", block, instruction=instruction, response_format=structured)
    if (fault := _fault(reply.text, schema)) is None:
        return task.ended(reply, {**told, "repaired": True})
    return task.steps.failed(code="invalid_extraction", message=f"no valid JSON, also after one repair: {fault}")


def _fault(answer: str, schema: dict[str, Any]) -> str | None:
    """What is wrong with an answer; None if it holds to the schema."""
    try:
        value = msgspec.json.decode(answer)
    except (ValueError, RecursionError) as error:
        return str(error)[:_SHOWN]
    fault = next(Draft202012Validator(schema).iter_errors(value), None)
    return None if fault is None else f"{fault.json_path}: {fault.message}"[:_SHOWN]


RECIPE = Recipe(
    "extract",
    "fields of each document, as JSON of a schema",
    Options,
    _run,
    instruction="Extract the fields from the document. Answer with JSON only.",
    max_tokens=512,
)
