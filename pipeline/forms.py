"""The forms that answers are held to: JSON schemas, looked at before they are used, matched in a time that is known.

A schema comes from a user, and an answer from a model: neither may keep a worker busy. So patterns are matched by RE2,
which takes linear time and refuses what cannot be, and schemas are limited in size, with references followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import msgspec
import re2
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import extend
from msgspec import Raw, Struct
from referencing import Registry
from referencing.exceptions import Unresolvable

MOST_SCHEMA_BYTES: Final = 32_768  # an engine compiles it to a grammar, without a limit of time
# Subschemas with references followed: a few lines of them can say more than can be checked in hours.
MOST_EXPANDED: Final = 2_000
KEPT_SCHEMAS: Final = 256  # batches have few; lines with their own each have theirs compiled anew
SHOWN_CHARACTERS: Final = 400  # of a fault


@dataclass(frozen=True, slots=True)
class AnswerSchema:
    """A schema that was looked at."""

    validator: Any

    def fault(self, answer: str) -> str | None:
        """What is wrong with an answer; None if it is JSON that holds to the schema."""
        try:
            value = msgspec.json.decode(answer)
            found = next(self.validator.iter_errors(value), None)
        except (ValueError, RecursionError, Unresolvable) as error:  # the last one is the schema's
            return str(error)[:SHOWN_CHARACTERS]
        return None if found is None else f"{found.json_path}: {found.message}"[:SHOWN_CHARACTERS]


@lru_cache(maxsize=KEPT_SCHEMAS)
def answer_schema(schema: bytes) -> AnswerSchema:
    """The schema of this JSON. Raises ValueError, with the remedy, for one that is wrong or may take ages."""
    if len(schema) > MOST_SCHEMA_BYTES:
        raise ValueError(f"schema: has more than {MOST_SCHEMA_BYTES:,} bytes; ask for less at once")
    read = msgspec.json.decode(schema)
    try:
        Draft202012Validator.check_schema(read)
        expanded = _expanded(read, read, {}, ())
    except SchemaError as error:
        raise ValueError(f"schema: {error.message[:SHOWN_CHARACTERS]}; write a JSON schema (draft 2020-12)") from error
    except RecursionError as error:
        raise ValueError("schema: is nested too deeply; flatten it") from error
    if expanded > MOST_EXPANDED:
        raise ValueError(f"schema: has over {MOST_EXPANDED:,} parts, references followed; ask for less at once")
    return AnswerSchema(_VALIDATOR(read, registry=Registry()))


def form_of(body: str | bytes) -> AnswerSchema | None:
    """What the answer to a request is held to by its `response_format`; None if that asks for no JSON.

    Raises ValueError for a schema that is wrong.
    """
    form = _BODY.decode(body).response_format
    if form is None:
        return None
    if form.type == "json_object":
        return answer_schema(_ANY_OBJECT)
    return None if form.json_schema is None else answer_schema(bytes(form.json_schema.schema))


def check_form(body: str | bytes) -> None:
    """Raises ValueError, with the remedy, if a request states a schema that no answer can be held to."""
    form_of(body)


class _Schema(Struct):
    schema: Raw = Raw(b"{}")


class _Format(Struct):
    type: str = "text"
    json_schema: _Schema | None = None


class _Body(Struct):
    response_format: _Format | None = None


_BODY: Final = msgspec.json.Decoder(_Body)
_ANY_OBJECT: Final = b'{"type":"object"}'


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that RE2 does not match: with look-around or back-references, say."""
    _compiled(pattern)


def _matches(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _compiled(pattern).search(instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


_VALIDATOR: Final = extend(Draft202012Validator, {"pattern": _matches})


@lru_cache(maxsize=KEPT_SCHEMAS)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        [fault] = error.args
        raise ValueError(
            f"schema: the pattern {pattern[:SHOWN_CHARACTERS]!r} is refused ({fault.decode(errors='replace')}); "
            "write it as RE2 has it: without look-around and back-references"
        ) from error


def _expanded(part: Any, schema: Any, known: dict[str, int], above: tuple[str, ...]) -> int:
    """How many subschemas a part has, with those referred to; `known` are references' own, `above` those followed.

    Raises ValueError for what cannot be checked in a time that is known: references in a circle, and patterns that
    names are matched with.
    """
    if isinstance(part, list):
        return sum(_expanded(member, schema, known, above) for member in part)
    if not isinstance(part, dict):
        return 0
    if "patternProperties" in part or "$dynamicRef" in part:
        raise ValueError("schema: patternProperties and $dynamicRef may take ages to check; leave them out")
    if isinstance(pattern := part.get("pattern"), str):
        check_pattern(pattern)
    size = 1 + sum(_expanded(member, schema, known, above) for member in part.values())
    if not isinstance(reference := part.get("$ref"), str):
        return size
    if reference in above:
        raise ValueError(f"schema: {reference[:SHOWN_CHARACTERS]} refers to itself; write its levels out")
    if reference not in known:
        known[reference] = _expanded(_referred(reference, schema), schema, known, (*above, reference))
    return size + known[reference]


def _referred(reference: str, schema: Any) -> Any:
    shown = reference[:SHOWN_CHARACTERS]
    if not reference.startswith("#/"):
        raise ValueError(f"schema: refers to {shown}, which is not fetched; put it under $defs: #/$defs/…")
    try:
        for name in reference[2:].split("/"):
            schema = schema[name.replace("~1", "/").replace("~0", "~")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"schema: refers to {shown}, which is not there") from error
    return schema
