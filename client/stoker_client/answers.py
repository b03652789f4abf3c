"""What a row ended with, as it stands in a line of the gateway's result files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from stoker_client.forms import Form
from stoker_client.lines import ROW

TRUNCATED: Final = "truncated: the answer was cut by its limit of tokens; raise max_output_tokens"
EMPTY: Final = "empty: the engine said nothing; reword the prompt"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one row ended with: an answer, an error, or both where an answer was cut.

    `row` counts from 1. `text` is what was said, `value` the label, the string that holds to the regex, the object
    that holds to the schema, or else the text. `error` is "code: message", None if all is well. Tokens are what the
    row took, asking again included: 0 for an earlier answer, None where there was no request. `source`: engine, exact,
    semantic, duplicate, reused or none.
    """

    row: int
    text: str | None
    value: Any
    error: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    source: str | None
    custom_id: str


def row_of(line: Mapping[str, Any]) -> int:
    """The row that a result line is about."""
    return int(line["custom_id"].removeprefix(ROW))


def answer_of(line: Mapping[str, Any], form: Form) -> Answer:
    """The answer in a line of the output file, or the error in one of the error file."""
    response, source = line["response"], line["stoker"]["source"]
    if response is None:
        return _failed(line, line["error"], source)
    body = response["body"]
    if line["stoker"]["outcome"] == "failed":
        inner = body.get("error", body) if isinstance(body, dict) else {}
        return _failed(line, {"code": f"status {response['status_code']}"} | _said_error(inner), source)
    text, value, error = _read(_text(body), line["stoker"]["outcome"], form)
    return Answer(
        row=row_of(line),
        text=text,
        value=value,
        error=error,
        **_tokens(line),
        source=source,
        custom_id=line["custom_id"],
    )


def not_run(row: int, error: str) -> Answer:
    """A row that no request was made for."""
    return Answer(row, None, None, error, None, None, None, f"{ROW}{row}")


def _failed(line: Mapping[str, Any], error: Mapping[str, Any], source: str) -> Answer:
    told = f"{error.get('code') or 'error'}: {error.get('message') or 'no reason was given'}"
    return Answer(
        row=row_of(line),
        text=None,
        value=None,
        error=told,
        **_tokens(line),
        source=source,
        custom_id=line["custom_id"],
    )


def _tokens(line: Mapping[str, Any]) -> dict[str, int]:
    """What a row took: as the line states it, else as the engine said in its answer, and zeros where neither counts.

    The usage in the body of an earlier answer is of who was answered first.
    """
    usage = line["stoker"].get("usage")
    if usage is None and line["stoker"]["source"] == "engine" and line["response"] is not None:
        body = line["response"]["body"]
        usage = body.get("usage") if isinstance(body, dict) else None
    stated = usage if isinstance(usage, dict) else {}
    counts = {name: stated.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count if isinstance(count, int) and count > 0 else 0 for name, count in counts.items()}


def _said_error(inner: Any) -> dict[str, Any]:
    """Code and message of an endpoint's own error, as far as it has them; a number is no code."""
    if not isinstance(inner, dict):
        return {"message": str(inner)}
    code = next((inner[name] for name in ("code", "type") if isinstance(inner.get(name), str)), None)
    found = {"code": code, "message": inner.get("message") or inner.get("detail")}
    return {name: str(value) for name, value in found.items() if value}


def _read(said: str, outcome: str, form: Form) -> tuple[str | None, Any, str | None]:
    """(text, value, error) of what was said."""
    if outcome == "empty":
        return said, None, EMPTY
    cut = TRUNCATED if outcome == "truncated" else None
    try:
        text, value = form.read(said)
    except ValueError as error:
        return said, None, cut or f"invalid_answer: {error}"
    return text, value, cut


def _text(body: Mapping[str, Any]) -> str:
    """What the first choice says; half a surrogate pair in it becomes a question mark."""
    choices = body.get("choices") or [{}]
    message = choices[0].get("message") or {}
    content = message.get("content") or message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return str(content).encode(errors="replace").decode()
