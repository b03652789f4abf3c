"""What answers are held to: labels, a pattern or a JSON schema, as the `response_format` of requests.

The gateway checks every answer against it, and asks once more where one does not hold to it. All of it, with what the
model is told, is as `stoker run TABLE --labels` has it, so that both make the same requests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stoker_client.errors import BadInput
from stoker_client.prompts import compact
from stoker_client.tables import Kind

INT64: Final = 2**63
MOST_LABELS: Final = 500  # as the command has it
MOST_REFERENCES: Final = 20  # one after the other; more are a circle
_KINDS: Final = {
    frozenset({"integer"}): Kind.INTEGER,
    frozenset({"integer", "number"}): Kind.NUMBER,
    frozenset({"boolean"}): Kind.BOOLEAN,
}
_TYPES: Final = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Form:
    """The form of all answers of one run.

    `argument`: which one states it. `schema`: what requests state; None: any text is an answer. `instruction`: what the
    system message says of it. `fields`: columns for the parts of an answer. `member`: the one member whose value is the
    answer. `model`: makes an object of an answer's JSON.
    """

    argument: str = "schema"
    schema: dict[str, Any] | None = None
    instruction: str | None = None
    fields: tuple[tuple[str, Kind], ...] = ()
    member: str | None = None
    model: Callable[[str], Any] | None = None

    @property
    def response_format(self) -> dict[str, Any] | None:
        """As the request states it."""
        if self.schema is None:
            return None
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema, "strict": True}}

    def read(self, text: str) -> tuple[str, Any]:
        """(the answer, its value) of what was said. Raises ValueError if that is not of this form."""
        if self.schema is None:
            return text, text
        parsed = json.loads(text)
        if self.member is not None:
            if not isinstance(parsed, dict) or not isinstance(parsed.get(self.member), str):
                raise ValueError(f"has no {self.member}")
            return parsed[self.member], parsed[self.member]
        return text, parsed if self.model is None else self.model(text)

    def parts(self, text: str) -> list[Any]:
        """The value for each of `fields`, of an answer that was read."""
        parsed = json.loads(text)
        found = parsed if isinstance(parsed, dict) else {}
        return [_held(found.get(name), kind) for name, kind in self.fields]


def form_of(*, labels: Sequence[str] | None, schema: Any, regex: str | None) -> Form:
    """The form that was asked for. Raises BadInput for one that cannot be, or several.

    What a pattern or a schema may hold is the gateway's to say, which has RE2: Python's `re` is another language.
    """
    stated = [name for name, value in (("labels", labels), ("schema", schema), ("regex", regex)) if value is not None]
    if len(stated) > 1:
        raise BadInput(f"{' and '.join(stated)}: an answer can be held to one of them; leave the others out")
    if labels is not None:
        return _labelled(labels)
    if regex is not None:
        return _patterned(regex)
    return Form() if schema is None else _structured(schema)


def _labelled(labels: Sequence[str]) -> Form:
    if isinstance(labels, str) or not all(isinstance(label, str) and label for label in labels):
        raise BadInput('labels: must be a list of strings that are not empty, such as ["bug", "praise"]')
    if not 2 <= len(labels) <= MOST_LABELS:
        raise BadInput(f'labels: has {len(labels)}; give 2 to {MOST_LABELS}, such as ["bug", "praise"]')
    if twice := [label for at, label in enumerate(labels) if label in labels[:at]]:
        raise BadInput(f"labels: {twice[0]!r} is there twice; leave one out")
    told = f'Answer with JSON, {{"label": L}}, where L is one of: {", ".join(labels)}.'
    return Form("labels", _with_member("label", {"type": "string", "enum": list(labels)}), told, member="label")


def _patterned(regex: str) -> Form:
    told = f'Answer with JSON, {{"answer": A}}, where A is a text that matches this regular expression: {regex}'
    return Form("regex", _with_member("answer", {"type": "string", "pattern": f"^(?:{regex})$"}), told, member="answer")


def _structured(schema: Any) -> Form:
    model = None
    if hasattr(schema, "model_json_schema") and hasattr(schema, "model_validate_json"):
        schema, model = schema.model_json_schema(), schema.model_validate_json
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise BadInput(
            'schema: must be a JSON schema of an object, of "type": "object", with the fields as its properties, or a '
            "pydantic model that has fields"
        )
    try:
        told = f"Answer with JSON of this schema: {compact(schema)}"
    except (TypeError, ValueError) as error:
        raise BadInput(f"schema: is no JSON ({error}); write it with strings, numbers, lists and dicts") from error
    properties = schema.get("properties") or {}
    fields = tuple((name, _kind_of(part, schema)) for name, part in properties.items())
    return Form("schema", schema, told, fields=fields, model=model)


def _with_member(name: str, form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: form}, "required": [name], "additionalProperties": False}


def _kind_of(part: Any, schema: Mapping[str, Any]) -> Kind:
    """The kind of a property's column: that of the one JSON type that its schema allows, be null allowed or not.

    Through `type`, `enum`, `const`, `$ref` and `anyOf`, `oneOf`, `allOf`. Integers or floats are floats. All else is
    text: strings as they are; lists, objects and what may be of several types as JSON.
    """
    found = _types_of(part, schema, 0) - {"null"}
    return next((kind for types, kind in _KINDS.items() if found and found <= types), Kind.TEXT)


def _types_of(part: Any, schema: Mapping[str, Any], depth: int) -> set[str]:
    """The JSON types that a property's value may have, as far as its schema says."""
    if not isinstance(part, dict) or depth > MOST_REFERENCES:
        return {"any"}
    if isinstance(reference := part.get("$ref"), str):
        return _types_of(_referred(reference, schema), schema, depth + 1)
    if stated := part.get("type"):
        return {stated} if isinstance(stated, str) else set(stated)
    if choices := part.get("anyOf") or part.get("oneOf") or part.get("allOf"):
        return set().union(*(_types_of(one, schema, depth + 1) for one in choices))
    values = part.get("enum") or ([part["const"]] if "const" in part else [])
    return {_TYPES.get(type(value), "any") for value in values} or {"any"}


def _referred(reference: str, schema: Any) -> Any:
    """What a reference inside the schema points to; None if that is not there, which the gateway will say."""
    for name in reference.removeprefix("#/").split("/"):
        schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _held(value: Any, kind: Kind) -> Any:
    """A part of an answer as its column holds it; None if it cannot, as an integer beyond 64 bits."""
    if value is None or kind is Kind.TEXT:
        return value if value is None or isinstance(value, str) else compact(value)
    if kind is Kind.BOOLEAN:
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind is Kind.INTEGER:
        return int(value) if -INT64 <= value < INT64 else None
    return float(value) if abs(value) < sys.float_info.max else None
