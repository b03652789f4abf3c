"""The forms that answers are held to: JSON schemas, looked at before they are used, matched in a time that is known.

A schema comes from a user, and an answer from a model: neither may keep a worker busy. So patterns are matched by RE2,
which takes linear time and refuses what cannot be, schemas are limited in size, with references followed, and every
check of an answer counts its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
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
# Keywords applied to values, in one check: 0.3 s at some 10 us each. 500 objects of ten fields take 20,000.
MOST_STEPS: Final = 30_000
VALUES_A_STEP: Final = 50  # of an enum, which is searched
KEPT_SCHEMAS: Final = 256  # batches have few
SHOWN_CHARACTERS: Final = 400  # of a fault

# Keywords whose members are schemas by name, so that their keys are no keywords.
_MAPS: Final = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})
# What may take ages, or changes what references mean and which validator a part is checked by.
_REFUSED: Final = frozenset(
    {
        "patternProperties",
        "$dynamicRef",
        "$id",
        "$anchor",
        "$dynamicAnchor",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)


class _TooLong(Exception):
    """A check that takes more than MOST_STEPS."""


@dataclass(frozen=True, slots=True)
class AnswerSchema:
    """A schema that was looked at."""

    validator: Any

    def fault(self, answer: str) -> str | None:
        """What is wrong with an answer; None if it is JSON that holds to the schema."""
        steps = _STEPS.set([MOST_STEPS])
        try:
            value = msgspec.json.decode(answer)
            found = next(self.validator.iter_errors(value), None)
        except _TooLong:
            return f"takes more than {MOST_STEPS:,} steps to check; ask for less at once, or simplify the schema"
        except (ValueError, RecursionError, Unresolvable) as error:  # the last one is the schema's
            return _shown(str(error))
        finally:
            _STEPS.reset(steps)
        return None if found is None else _shown(f"{found.json_path}: {found.message}")


def _shown(fault: str) -> str:
    """As a row takes it: cut, and without NUL, which schemas and answers may have."""
    return fault[:SHOWN_CHARACTERS].replace("\0", " ")


@lru_cache(maxsize=KEPT_SCHEMAS)
def answer_schema(schema: bytes) -> AnswerSchema:
    """The schema of this JSON. Raises ValueError, with the remedy, for one that is wrong or may take ages."""
    if len(schema) > MOST_SCHEMA_BYTES:
        raise ValueError(f"schema: has more than {MOST_SCHEMA_BYTES:,} bytes; ask for less at once")
    try:
        read = msgspec.json.decode(schema)
        Draft202012Validator.check_schema(read, format_checker=None)  # patterns are RE2's
        expanded = _Expansion(read).of(read, (), is_root=True)
    except SchemaError as error:
        raise ValueError(f"schema: {error.message[:SHOWN_CHARACTERS]}; write a JSON schema (draft 2020-12)") from error
    except RecursionError as error:
        raise ValueError(f"schema: {_TOO_DEEP}") from error
    if expanded > MOST_EXPANDED:
        raise ValueError(f"schema: has over {MOST_EXPANDED:,} parts, references followed; ask for less at once")
    return AnswerSchema(_VALIDATOR(read, registry=Registry()))


def form_of(body: str | bytes) -> AnswerSchema | None:
    """What the answer to a request is held to by its `response_format`; None if that asks for no JSON.

    Raises ValueError for a schema that is wrong.
    """
    schema = _schema_in(_read(body))
    return None if schema is None else answer_schema(schema)


def check_form(body: str | bytes) -> int | None:
    """Tells the schema of a request from others; None if it asks for no JSON.

    Raises ValueError, with the remedy, if no answer can be held to it.
    """
    read = _read(body)
    if (read.n or 1) > 1:
        raise ValueError("n: several answers to one request are not validated; ask for one")
    schema = _schema_in(read)
    if schema is None:
        return None
    answer_schema(schema)
    return hash(schema)


class _Schema(Struct):
    schema: Raw = Raw(b"{}")


class _Format(Struct):
    type: str = "text"
    json_schema: _Schema | None = None


class _Body(Struct):
    response_format: _Format | None = None
    n: int | None = None


_BODY: Final = msgspec.json.Decoder(_Body)
_TOO_DEEP: Final = "is nested too deeply; flatten it"
_ANY_OBJECT: Final = b'{"type":"object"}'


def _read(body: str | bytes) -> _Body:
    try:
        return _BODY.decode(body)
    except RecursionError as error:
        raise ValueError(f"the body {_TOO_DEEP}") from error


def _schema_in(body: _Body) -> bytes | None:
    """The schema that a request states, as JSON."""
    form = body.response_format
    if form is None or form.json_schema is None:
        return _ANY_OBJECT if form is not None and form.type == "json_object" else None
    return bytes(form.json_schema.schema)


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that RE2 does not match: with look-around or back-references, say."""
    _compiled(pattern)


_Check = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]
_STEPS: ContextVar[list[int]] = ContextVar("steps")


def _counted(name: str, check: _Check) -> _Check:
    """The check of a keyword, which ends all checking once there were too many."""

    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError] | None:
        left = _STEPS.get()
        left[0] -= 1 + (len(value) // VALUES_A_STEP if name == "enum" else 0)
        if left[0] < 0:
            raise _TooLong
        return check(validator, value, instance, schema)

    return counted


def _matches(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    del validator, schema
    if isinstance(instance, str) and not _compiled(pattern).search(instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _unique(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """In linear time; 1 and 1.0, which JSON schema holds for equal, may both be there."""
    del validator, schema
    if wanted and isinstance(instance, list):
        forms = [msgspec.json.encode(item, order="deterministic") for item in instance]
        if len(set(forms)) < len(forms):
            yield ValidationError(f"{instance!r} has non-unique elements")


_OWN: Final[Mapping[str, _Check]] = {"pattern": _matches, "uniqueItems": _unique}
_CHECKS: Final[Mapping[str, _Check]] = {**Draft202012Validator.VALIDATORS, **_OWN}
_VALIDATOR: Final = extend(Draft202012Validator, {name: _counted(name, check) for name, check in _CHECKS.items()})


@lru_cache(maxsize=KEPT_SCHEMAS)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        fault = _shown(error.args[0].decode(errors="replace"))
        raise ValueError(
            f"schema: the pattern {pattern[:SHOWN_CHARACTERS]!r} is refused ({fault}); "
            "write it as RE2 takes it, which has no look-around and no back-references"
        ) from error


class _Expansion:
    """Counts the subschemas of a schema with those referred to, each time that they are."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._known: dict[str, int] = {}

    def of(self, part: Any, above: tuple[str, ...], *, is_root: bool = False, is_map: bool = False) -> int:
        """How many a part has; `above` are the references that were followed to it.

        Raises ValueError for what cannot be checked in a time that is known.
        """
        if isinstance(part, list):
            return sum(self.of(member, above) for member in part)
        if not isinstance(part, dict):
            return 0
        if is_map:
            return sum(self.of(member, above) for member in part.values())
        self._check(part, is_root=is_root)
        size = 1 + sum(self.of(member, above, is_map=name in _MAPS) for name, member in part.items())
        if not isinstance(reference := part.get("$ref"), str):
            return size
        if reference in above:
            raise ValueError(f"schema: {_shown(reference)} refers to itself; write its levels out")
        if reference not in self._known:
            self._known[reference] = self.of(self._referred(reference), (*above, reference))
        return size + self._known[reference]

    def _check(self, part: Mapping[str, Any], *, is_root: bool) -> None:
        refused = _REFUSED if is_root else {*_REFUSED, "$schema"}
        if found := sorted(refused & part.keys()):
            raise ValueError(f"schema: {', '.join(found)} may take ages to check, or hide what does; leave them out")
        if isinstance(pattern := part.get("pattern"), str):
            check_pattern(pattern)

    def _referred(self, reference: str) -> Any:
        shown = _shown(reference)
        if not reference.startswith("#/") or "%" in reference:
            raise ValueError(f"schema: refers to {shown}, which is not fetched; put it under $defs: #/$defs/…")
        found = self._schema
        try:
            for name in reference[2:].split("/"):
                found = found[name.replace("~1", "/").replace("~0", "~")]
        except (KeyError, TypeError) as error:
            raise ValueError(f"schema: refers to {shown}, which is not there") from error
        return found
