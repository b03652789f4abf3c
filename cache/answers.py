"""Answers as the cache compares them: labels, numbers, JSON. Free text is never the same, so it stays in the shadow."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

import msgspec

LONGEST_LABEL: Final = 64  # characters
LONGEST_NUMBER: Final = 100  # digits, and the largest power of ten


def _decimal(text: str) -> Decimal:
    """As floats, numbers that differ in their last digits would be one."""
    try:
        return Decimal(text)
    except ArithmeticError as error:  # an exponent beyond what decimals have
        raise ValueError(str(error)) from error


_VALUE: Final = msgspec.json.Decoder(float_hook=_decimal)


class Kind(StrEnum):
    """How an answer is compared."""

    LABEL = "label"
    NUMBER = "number"
    JSON = "json"
    FREE = "free"


def comparable(text: str) -> tuple[Kind, str]:
    """The kind of an answer and the one form in which answers that mean the same are equal.

    A label loses white space at its ends and nothing else: "Yes." is not "Yes". Only kinds other than FREE may be
    served. FREE is also what Postgres would not store, and JSON with a number that is too long to compare.
    """
    stripped = text.strip()
    if "\0" in stripped:
        return Kind.FREE, stripped
    try:
        value: Any = _VALUE.decode(stripped)
        form = msgspec.json.encode(_same(value), order="deterministic").decode()
    except (ValueError, RecursionError):
        value = form = ""
    if isinstance(value, dict | list):
        return Kind.JSON, form
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return Kind.NUMBER, form
    if stripped and len(stripped) <= LONGEST_LABEL and "\n" not in stripped:
        return Kind.LABEL, stripped
    return Kind.FREE, stripped


def _same(value: Any) -> Any:
    """The same for JSON values that mean the same, once their fields are sorted. Raises ValueError for long numbers."""
    if isinstance(value, dict):
        return {name: _same(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_same(member) for member in value]
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return msgspec.Raw(_form(Decimal(value)))
    return value


def _form(number: Decimal) -> bytes:
    """A number's one form: digits without trailing zeros, and a power of ten. Nothing is rounded or expanded."""
    sign, digits, exponent = number.as_tuple()
    kept = "".join(map(str, digits)).rstrip("0")
    power = int(exponent) + len(digits) - len(kept)
    if len(digits) > LONGEST_NUMBER or abs(power) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits, times ten to the {power}")
    return f"{'-' * sign}{kept}e{power}".encode() if kept else b"0"


def comparison(response: str) -> str | None:
    """What a response is compared by; None unless it is one whole answer that may be served: no free text."""
    text = answer_text(response)
    if text is None:
        return None
    kind, form = comparable(text)
    return None if kind is Kind.FREE else f"{kind.value}:{form}"


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Answer)


def answer_text(response: str) -> str | None:
    """The text of a response with one whole answer; None for a refusal, a tool call, a cut or filtered one."""
    try:
        choices = _DECODER.decode(response).choices
    except (ValueError, RecursionError):
        return None
    if len(choices) != 1 or choices[0].finish_reason != "stop":
        return None
    message = choices[0].message
    if message is None:
        return choices[0].text
    if message.refusal or message.tool_calls or message.function_call:
        return None
    return message.content
