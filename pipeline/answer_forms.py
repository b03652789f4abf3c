"""What a table's answers are to look like: one of some labels, a text that matches, or fields of a JSON schema.

Each is a JSON schema in the request's `response_format`, which every engine takes, and which answers are held to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from pipeline.forms import answer_schema, check_pattern
from runtime.errors import BadInput

MOST_LABELS: Final = 500


class FormKind(StrEnum):
    """How an answer is read."""

    LABELS = "labels"
    REGEX = "regex"
    SCHEMA = "schema"


_MEMBERS: Final[Mapping[str, str]] = {FormKind.LABELS: "label", FormKind.REGEX: "answer"}


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """`instruction` is what the system message says of it."""

    kind: str
    schema: Mapping[str, Any]
    instruction: str

    @property
    def response_format(self) -> dict[str, Any]:
        """The request's field."""
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema, "strict": True}}

    @property
    def fields(self) -> Mapping[str, Mapping[str, Any]]:
        """The schema's own properties, where it is the user's."""
        found: Mapping[str, Mapping[str, Any]] = self.schema.get("properties", {})
        return found if self.kind == FormKind.SCHEMA else {}

    def read(self, text: str) -> tuple[str, Mapping[str, Any]]:
        """(the answer, its fields) of what the engine said."""
        try:
            said = msgspec.json.decode(text)
        except (ValueError, RecursionError):
            return text, {}
        if not isinstance(said, dict):
            return text, {}
        member = _MEMBERS.get(self.kind)
        if member is None:
            return text, said
        return str(said.get(member, text)), {}


def labels_form(labels: Sequence[str]) -> AnswerForm:
    """One of these. Raises BadInput for fewer than two, more than MOST_LABELS, or one that is there twice."""
    if not 2 <= len(labels) <= MOST_LABELS:
        raise BadInput(f"--labels: has {len(labels)}; give 2 to {MOST_LABELS}, such as --labels yes,no")
    if repeated := next((label for label in labels if labels.count(label) > 1), None):
        raise BadInput(f"--labels: {repeated!r} is there twice; give each once")
    told = f'Answer with JSON, {{"label": L}}, where L is one of: {", ".join(labels)}.'
    return _checked(FormKind.LABELS, {"type": "string", "enum": list(labels)}, told)


def regex_form(pattern: str) -> AnswerForm:
    """A text that the whole of the pattern matches. Raises BadInput for a pattern that RE2 refuses."""
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise BadInput(f"--regex: {str(error).removeprefix('schema: ')}") from error
    told = f'Answer with JSON, {{"answer": A}}, where A is a text that matches this regular expression: {pattern}'
    return _checked(FormKind.REGEX, {"type": "string", "pattern": f"^(?:{pattern})$"}, told)


def schema_form(schema: Any, *, named: str = "--schema") -> AnswerForm:
    """An object of this JSON schema. Raises BadInput, which says what it is `named`, for one that is wrong."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise BadInput(f'{named}: must be of "type": "object", with the fields as its properties')
    try:
        answer_schema(msgspec.json.encode(schema))
    except ValueError as error:
        raise BadInput(f"{named}: {str(error).removeprefix('schema: ')}") from error
    told = f"Answer with JSON of this schema: {json.dumps(schema, ensure_ascii=False, separators=(',', ':'))}"
    return AnswerForm(FormKind.SCHEMA, schema, told)


def _checked(kind: FormKind, member: Mapping[str, Any], told: str) -> AnswerForm:
    name = _MEMBERS[kind]
    schema = {"type": "object", "properties": {name: member}, "required": [name], "additionalProperties": False}
    try:
        answer_schema(msgspec.json.encode(schema))
    except ValueError as error:
        raise BadInput(f"--{kind}: {str(error).removeprefix('schema: ')}") from error
    return AnswerForm(kind, schema, told)
