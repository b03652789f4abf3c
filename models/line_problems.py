"""Why a line of a batch file was refused, in plain words with the remedy: the slow path of models/lines.py.

Nothing here decides whether a line is good; it finds the words for a line that was refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Container

import msgspec

from runtime.errors import Problem

# What msgspec and UTF-8 decoding raise for bytes that are no good line.
LINE_REFUSALS = (msgspec.MsgspecError, UnicodeError, RecursionError)

SHOWN_CHARACTERS = 60

_BODY_RULES = {
    "model": "must be a non-empty string: name a model in the line, or submit with --model NAME for all lines",
    "messages": "must be a non-empty list of objects, each with a `role` that is a string",
    "prompt": "must be a string or a non-empty list",
    "input": "must be a string or a non-empty list",
    "stream": "must be false or left out: a batch cannot stream",
    "n": "must be a whole number from 1 to 128",
    "temperature": "must be a number from 0 to 2",
    "top_p": "must be a number above 0 and at most 1",
    "presence_penalty": "must be a number from -2 to 2",
    "frequency_penalty": "must be a number from -2 to 2",
    "max_tokens": "must be a whole number of at least 1; left out, --max-output-tokens stands for it",
    "max_completion_tokens": "must be a whole number of at least 1; left out, --max-output-tokens stands for it",
    "top_logprobs": "must be a whole number from 0 to 20",
}
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def explain_line(raw: bytes, number: int, *, line_bytes: int) -> Problem:
    """The problem of a line that is too long, no JSON, or wrong outside its body."""
    if len(raw.rstrip(b"\r\n")) > line_bytes:
        return Problem(number, "invalid_request", None, (
            f"the line is longer than {line_bytes:,} bytes; make it shorter, or raise STOKER_LIMITS__LINE_BYTES"))
    return _encoding_problem(raw, number) or _json_problem(raw, number) or _member_problem(raw, number)


def explain_url(url: str, number: int, *, endpoint: str | None, endpoints: Collection[str]) -> Problem:
    """The problem of a line whose url is unknown, or is not the batch's."""
    if url not in endpoints:
        return Problem(number, "url_mismatch", "url", (
            f"{_shown(url)} is no endpoint of a batch; use {_either(endpoints)}"))
    return Problem(number, "url_mismatch", "url", (
        f"{_shown(url)} differs from {endpoint}, the url of the lines before; a batch has one endpoint: "
        "put the others in a file of their own"))


def explain_body(body: bytes, number: int, *, error: Exception, replaced: Container[str]) -> Problem:
    """The problem of a body that its endpoint's rules refused with `error`."""
    text = str(error)
    path = "".join(re.findall(r" - at `\$([^`]*)`$", text))
    missing = re.match(r"Object missing required field `([^`]+)`", text)
    field = f"body{path}" + (f".{missing[1]}" if missing else "")
    name = re.split(r"[.\[]", field + ".")[1]
    if not name:
        return Problem(number, "invalid_request", "body", "must be a JSON object: the request to the endpoint")
    rule = _BODY_RULES.get(name, f"cannot be used: {text}")
    given = "is missing; it" if missing else _given(body, name)
    origin = "; it comes from the submit's own options" if name in replaced else ""
    return Problem(number, "invalid_request", field, f"{given} {rule}{origin}".lstrip())


def _encoding_problem(raw: bytes, number: int) -> Problem | None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return Problem(number, "invalid_json_line", None, (
            f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"))
    if b"\0" in raw:
        return Problem(number, "invalid_json_line", None, (
            f"a NUL byte at byte {raw.index(0) + 1} of the line; the file is damaged or not UTF-8: write it again"))
    return None


def _json_problem(raw: bytes, number: int) -> Problem | None:
    try:
        msgspec.json.decode(raw)
    except RecursionError:
        cause = "JSON nested too deeply; flatten it"
    except msgspec.DecodeError as error:
        cause = _cause(raw, str(error))
    else:
        return None
    return Problem(number, "invalid_json_line", None, cause)


def _cause(raw: bytes, text: str) -> str:
    lone = _LONE_SURROGATE.search(raw.decode())
    if lone and _is_json(raw):
        return (f"the escape {lone[0]} is half of a surrogate pair, which is no character; "
                "cut texts between characters, not inside them, or remove the escape")
    if "truncated" in text:
        if raw.endswith(b"\n"):
            return "the JSON ends too early; write each request as one complete JSON object on one line"
        return "the file ends inside this line; it was cut off: copy or upload it again"
    place = re.search(r"^(?:JSON is malformed: )?(.*) \(byte (\d+)\)$", text)
    found = f"{place[1]} at byte {int(place[2]) + 1} of the line" if place else text
    return f"malformed JSON: {found}; write one JSON object a line"


def _member_problem(raw: bytes, number: int) -> Problem:
    line = msgspec.json.decode(raw)
    if not isinstance(line, dict):
        return Problem(number, "invalid_json_line", None, (
            f"must be a JSON object with custom_id, method, url and body, not {_kind(line)}"))
    custom_id = line.get("custom_id")
    if custom_id in (None, ""):
        return Problem(number, "missing_custom_id", "custom_id", (
            "is missing or empty; give every line its own, such as \"request-1\""))
    if not isinstance(custom_id, str) or len(custom_id) > 512 or "\0" in custom_id:
        return Problem(number, "invalid_request", "custom_id", _custom_id_fault(custom_id))
    if line.get("method") != "POST":
        return Problem(number, "invalid_request", "method", 'must be "POST"')
    if not isinstance(line.get("url"), str):
        return Problem(number, "url_mismatch", "url", 'is missing or no string; write "/v1/chat/completions", for one')
    return Problem(number, "invalid_request", "body", "is missing; it must be a JSON object: the request to the endpoint")


def _custom_id_fault(custom_id: object) -> str:
    if not isinstance(custom_id, str):
        return f"must be a string, not {_kind(custom_id)}; put it in quotes"
    if len(custom_id) > 512:
        return f"has {len(custom_id):,} characters; use at most 512"
    return r"holds \u0000, which Postgres cannot store; leave it out"


def _given(body: bytes, name: str) -> str:
    """The value that was refused if it is short and no prompt, else nothing."""
    value = msgspec.json.decode(body).get(name)
    return f"is {_shown(value)};" if isinstance(value, int | float | str) and name not in ("prompt", "input") else ""


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _either(words: Collection[str]) -> str:
    *some, last = words
    return f"{', '.join(some)} or {last}" if some else last


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True
