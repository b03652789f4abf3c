"""Extract: fields of a document as JSON of a given schema, validated, with one repair before a stated error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from jsonschema import Draft202012Validator, SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

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
        if self.schema.get("type") != "object":
            raise ValueError('schema: must be of "type": "object", with the fields as its properties')
        if len(msgspec.json.encode(self.schema)) > MOST_SCHEMA_BYTES:
            raise ValueError(f"schema: has more than {MOST_SCHEMA_BYTES:,} bytes; ask for less at once")
        try:
            Draft202012Validator.check_schema(self.schema)
            foreign = next((ref for ref in _references(self.schema) if not ref.startswith("#")), None)
        except SchemaError as error:
            raise ValueError(f"schema: {error.message[:_SHOWN]}; write a JSON schema (draft 2020-12)") from error
        except RecursionError as error:
            raise ValueError("schema: is nested too deeply; flatten it") from error
        if foreign is not None:
            raise ValueError(f"schema: refers to {foreign[:_SHOWN]}, which is not fetched; put it under $defs")


async def _run(task: Task) -> JobResult:
    schema = task.options.schema
    block, told = await whole_or_first(task, task.instruction)
    structured = {"type": "json_schema", "json_schema": {"name": "extraction", "schema": schema, "strict": True}}
    reply = await task.ask("extract", block, response_format=structured)
    if (fault := _fault(reply.text, schema)) is None:
        return task.ended(reply, told)
    instruction = _REPAIR.format(instruction=task.instruction, fault=fault, answer=reply.text)
    block, told = await whole_or_first(task, instruction)
    reply = await task.ask("repair", block, instruction=instruction, response_format=structured)
    if (fault := _fault(reply.text, schema)) is None:
        return task.ended(reply, {**told, "repaired": True})
    return task.steps.failed(code="invalid_extraction", message=f"no valid JSON, also after one repair: {fault}")


def _fault(answer: str, schema: dict[str, Any]) -> str | None:
    """What is wrong with an answer; None if it holds to the schema."""
    try:
        value = msgspec.json.decode(answer)
        fault = next(Draft202012Validator(schema, registry=Registry()).iter_errors(value), None)
    except (ValueError, RecursionError, Unresolvable, re.error) as error:  # the last two are the schema's
        return str(error)[:_SHOWN]
    return None if fault is None else f"{fault.json_path}: {fault.message}"[:_SHOWN]


def _references(schema: Any) -> Iterator[str]:
    """What a schema refers to, at any depth."""
    if isinstance(schema, dict):
        yield from (ref for name in ("$ref", "$dynamicRef") if isinstance(ref := schema.get(name), str))
    for member in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _references(member)


RECIPE = Recipe(
    "extract",
    "fields of each document, as JSON of a schema",
    Options,
    _run,
    instruction="Extract the fields from the document. Answer with JSON only.",
    max_tokens=512,
)
