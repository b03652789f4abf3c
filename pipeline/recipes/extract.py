"""Extract: fields of a document as JSON of a given schema, validated, with one repair before a stated error."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from jsonschema import Draft202012Validator, SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from documents.prompt import document_block
from models.jobs import JobResult
from pipeline.recipe import Recipe, Task, whole_or_first

MOST_SCHEMA_BYTES: Final = 32_768  # an engine compiles it to a grammar, without a limit of time
# Subschemas with references followed: a few lines of them can say more than can be checked in hours.
MOST_EXPANDED: Final = 2_000
_REPAIR: Final = (
    "{instruction}\n\nThe second text is your last answer and what is wrong with it. Answer with valid JSON."
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
            expanded = _expanded(self.schema, self.schema, {}, ())
        except SchemaError as error:
            raise ValueError(f"schema: {error.message[:_SHOWN]}; write a JSON schema (draft 2020-12)") from error
        except RecursionError as error:
            raise ValueError("schema: is nested too deeply; flatten it") from error
        if expanded > MOST_EXPANDED:
            raise ValueError(f"schema: has over {MOST_EXPANDED:,} parts, references followed; ask for less at once")


async def _run(task: Task) -> JobResult:
    schema = task.options.schema
    block, told = await whole_or_first(task, task.instruction)
    structured = {"type": "json_schema", "json_schema": {"name": "extraction", "schema": schema, "strict": True}}
    reply = await task.ask("extract", block, response_format=structured)
    if (fault := _fault(reply.text, schema)) is None:
        return task.ended(reply, told)
    instruction = _REPAIR.format(instruction=task.instruction)
    again = document_block(f"{reply.text}\n\n{fault}")  # both say what the document made the engine say: data too
    block, told = await whole_or_first(task, f"{again}\n\n{instruction}")
    block = f"{block}\n\n{again}"
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


def _expanded(part: Any, schema: dict[str, Any], known: dict[str, int], above: tuple[str, ...]) -> int:
    """How many subschemas a part has, with those referred to; `known` are references' own, `above` those followed.

    Raises ValueError for what cannot be checked in a time that is known: patterns, and references in a circle.
    """
    if isinstance(part, list):
        return sum(_expanded(member, schema, known, above) for member in part)
    if not isinstance(part, dict):
        return 0
    if isinstance(part.get("pattern"), str) or "patternProperties" in part or "$dynamicRef" in part:
        raise ValueError("schema: pattern, patternProperties and $dynamicRef may take ages to check; leave them out")
    size = 1 + sum(_expanded(member, schema, known, above) for member in part.values())
    if not isinstance(reference := part.get("$ref"), str):
        return size
    if reference in above:
        raise ValueError(f"schema: {reference[:_SHOWN]} refers to itself; write its levels out")
    if reference not in known:
        known[reference] = _expanded(_referred(reference, schema), schema, known, (*above, reference))
    return size + known[reference]


def _referred(reference: str, schema: Any) -> Any:
    if not reference.startswith("#/"):
        raise ValueError(f"schema: refers to {reference[:_SHOWN]}, which is not fetched; put it under $defs: #/$defs/…")
    try:
        for name in reference[2:].split("/"):
            schema = schema[name.replace("~1", "/").replace("~0", "~")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"schema: refers to {reference[:_SHOWN]}, which is not there") from error
    return schema


RECIPE = Recipe(
    "extract",
    "fields of each document, as JSON of a schema",
    Options,
    _run,
    instruction="Extract the fields from the document. Answer with JSON only.",
    max_tokens=512,
)
