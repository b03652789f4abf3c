"""Why a line of a batch file was refused, in plain words with the remedy: the slow path of models/lines.py.

Nothing here decides whether a line is good; it finds the words for a line that was refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Container
from typing import NoReturn

import msgspec

from models.line_settings import MOST_PASSAGES, MOST_TURNS, LineSettings
from runtime.errors import Problem

# What msgspec and UTF-8 decoding raise for bytes that are no good line.
LINE_REFUSALS = (msgspec.MsgspecError, UnicodeError, RecursionError)

CUSTOM_ID_CHARACTERS = 512
SHOWN_CHARACTERS = 60
# Of settings. How deep JSON may be read depends on the reader's stack, and a worker's is deeper than submit's.
MOST_DEPTH = 64

_LIMIT_RULE = "must be a whole number of at least 1; left out, --max-output-tokens stands for it"
_BODY_RULES = {
    "model": r"must be a non-empty string without \u0000: name a model in the line, or submit with --model NAME",
    "messages": "must be a non-empty list of objects, each with a `role` that is a string",
    "prompt": "must be a string or a non-empty list",
    "input": "must be a string or a non-empty list",
    "stream": "must be false or left out: a batch cannot stream",
    "n": "must be a whole number from 1 to 128",
    "temperature": "must be a number from 0 to 2",
    "top_p": "must be a number above 0 and at most 1",
    "presence_penalty": "must be a number from -2 to 2",
    "frequency_penalty": "must be a number from -2 to 2",
    "priority": "must be left out: engines compute by it, and batches have --priority",
    "max_tokens": _LIMIT_RULE,
    "max_completion_tokens": _LIMIT_RULE,
    "top_logprobs": "must be a whole number from 0 to 20",
}
_SETTINGS_RULES = {
    "cache": 'must be "off", "exact" or "semantic"',
    "template": 'must be a string with slots, such as "Sort this message: {text}"',
    "variables": 'must be an object of strings, one for each slot of the template, such as {"text": "…"}',
    "sources": "must be a list of non-empty strings: the names of the documents that the prompt was made from",
    "turns": f"must be a list of 1 to {MOST_TURNS:,} non-empty strings: what the user says, one after each reply",
    "conversation": 'must be the id of an ended conversation, such as "batch_req_01a2…_7", from its result line',
    "window_tokens": "must be a whole number of at least 64: the most tokens of one prompt with its answer",
    "collection": "must be the name of a collection; `stoker documents list` shows them",
    "top_k": f"must be a whole number from 1 to {MOST_PASSAGES}: how many passages go into the prompt",
    "query": "must be a non-empty string: what the passages are to be about, if not the last user message",
    "context_tokens": "must be a whole number of at least 16: the most tokens of all passages in the prompt",
    "recipe": "must be the name of a recipe; `stoker submit --help` lists them",
    "document": "must be the id of a document, a whole number; `stoker documents list` shows them",
    "options": "must be an object: the options of the recipe",
}
_MESSAGE_RULE = 'must be as in {"role": "user", "content": …}, with a string for the role'
_UNSHOWN = frozenset({"messages", "prompt", "input"})  # what a problem shows may end in a log
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def explain_line(raw: bytes, number: int, *, line_bytes: int) -> Problem:
    """The problem of a line that is too long, no JSON, or wrong outside its body."""
    if len(raw.rstrip(b"\r\n")) > line_bytes:
        return Problem(
            number,
            "invalid_request",
            None,
            (f"the line has more than {line_bytes:,} bytes; shorten it, or raise STOKER_LIMITS__LINE_BYTES"),
        )
    return (
        _encoding_problem(raw, number)
        or _json_problem(raw, number)
        or _settings_shape_problem(raw, number)
        or _member_problem(raw, number)
    )


def explain_url(url: str, number: int, *, endpoint: str | None, endpoints: Collection[str]) -> Problem:
    """The problem of a line whose url is unknown, or is not the batch's."""
    if url not in endpoints:
        return Problem(
            number, "url_mismatch", "url", (f"is {_shown(url)}, no endpoint of a batch; use {', '.join(endpoints)}")
        )
    return Problem(
        number,
        "url_mismatch",
        "url",
        (
            f"is {_shown(url)}, but the lines before, or the batch itself, have {endpoint}; a batch has one endpoint: "
            "put the others in a file of their own"
        ),
    )


def explain_body(body: bytes, number: int, *, error: Exception, replaced: Container[str]) -> Problem:
    """The problem of a body that the rules of its endpoint refused with `error`."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return Problem(number, "invalid_json_line", "body", f"cannot be read: {text}; write plain values")
    path = "".join(re.findall(r" - at `\$([^`]*)`$", text))
    missing = re.match(r"Object missing required field `([^`]+)`", text)
    field = f"body{path}" + (f".{missing[1]}" if missing else "")
    name = re.split(r"[.\[]", field + ".")[1]
    if not name:
        return Problem(number, "invalid_request", "body", "must be a JSON object: the endpoint's request")
    given = "is missing; it" if missing else _given(body, name)
    origin = "; the submit's own options set it" if name in replaced else ""
    rule = _MESSAGE_RULE if path.startswith(".messages[") else _BODY_RULES[name]
    return Problem(number, "invalid_request", field, f"{given} {rule}{origin}".lstrip())


def settings_problem(settings: LineSettings, url: str, number: int) -> Problem | None:
    """What is wrong with a `stoker` object of which every field is well formed."""
    if fault := _steps_fault(settings, url):
        pass
    elif settings.template is None and settings.variables is not None:
        fault = "template", "is missing, but stoker.variables is there; write the template that they fill"
    elif settings.variables is None and settings.template is not None:
        fault = "variables", "is missing, but stoker.template is there; give each of its slots a value"
    elif found := next(filter(None, (_unfit(name, getattr(settings, name)) for name in _SETTINGS_RULES)), None):
        fault = found
    else:
        return None
    return Problem(number, "invalid_request", f"stoker.{fault[0]}", fault[1])


_NEEDS = (
    ("conversation", "turns"),
    ("top_k", "collection"),
    ("query", "collection"),
    ("context_tokens", "collection"),
    ("recipe", "document"),
    ("document", "recipe"),
    ("options", "recipe"),
)
_EXCLUDING = (
    ("recipe", "turns"),
    ("recipe", "collection"),
    ("recipe", "template"),
    ("turns", "template"),
)


def _steps_fault(settings: LineSettings, url: str) -> tuple[str, str] | None:
    """Fields that need another one, exclude each other, or fit no other endpoint than chats."""
    given = {name for name in _SETTINGS_RULES if getattr(settings, name) is not None}
    for name, needed in _NEEDS:
        if name in given and needed not in given:
            return needed, f"is missing, but stoker.{name} is there; it {_SETTINGS_RULES[needed]}"
    if "window_tokens" in given and not settings.has_steps:
        return "window_tokens", "is for lines with turns or a recipe: leave it out"
    if settings.has_steps and url != "/v1/chat/completions":
        return ("turns" if "turns" in given else "recipe"), f"needs /v1/chat/completions, and url is {url}"
    if "collection" in given and url == "/v1/embeddings":
        return "collection", "has no sense for embeddings: leave it out"
    for name, other in _EXCLUDING:
        if name in given and other in given:
            return name, f"cannot be with stoker.{other}: put them on lines of their own"
    return None


def _unfit(name: str, value: object) -> tuple[str, str] | None:
    """The field and its fault, if no row takes the value, or a worker might not read it."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, str) and "\0" in one:
            return name, r"holds \u0000, which Postgres cannot store; leave it out"
        if isinstance(one, dict | list):
            if depth == MOST_DEPTH:
                return name, f"is nested more than {MOST_DEPTH} levels deep; flatten it"
            waiting += [(member, depth + 1) for member in one]
            waiting += [(member, depth + 1) for member in one.values()] if isinstance(one, dict) else []
    return None


def _encoding_problem(raw: bytes, number: int) -> Problem | None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return Problem(
            number,
            "invalid_json_line",
            None,
            (f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"),
        )
    if b"\0" in raw:
        return Problem(
            number,
            "invalid_json_line",
            None,
            (f"a NUL byte at byte {raw.index(0) + 1} of the line; the file is damaged or not UTF-8: write it again"),
        )
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
    if lone and _is_lax_json(raw):
        return (
            f"the escape {lone[0]} is half of a surrogate pair, which is no character; "
            "remove it, and cut texts between characters, not inside them"
        )
    if "truncated" in text:
        if raw.endswith(b"\n"):
            return "the JSON ends too early; write each request as one whole JSON object on one line"
        return "the file ends inside this line: it was cut off; copy or upload it again"
    place = re.search(r"^(?:JSON is malformed: )?(.*) \(byte (\d+)\)$", text)
    found = f"{place[1]} at byte {int(place[2]) + 1} of the line" if place else text
    return f"malformed JSON: {found}; write one JSON object a line"


def _member_problem(raw: bytes, number: int) -> Problem:
    line = msgspec.json.decode(raw)
    if not isinstance(line, dict):
        return Problem(
            number,
            "invalid_json_line",
            None,
            (f"is {_kind(line)}; write a JSON object with custom_id, method, url and body"),
        )
    custom_id = line.get("custom_id")
    if custom_id is None or custom_id == "":
        return Problem(
            number,
            "missing_custom_id",
            "custom_id",
            ('is missing or empty; give every line its own, such as "request-1"'),
        )
    if fault := _custom_id_fault(custom_id):
        return Problem(number, "invalid_request", "custom_id", fault)
    if not isinstance(line.get("url"), str):
        return Problem(
            number,
            "url_mismatch",
            "url",
            ('is missing or no string; write the endpoint, such as "/v1/chat/completions"'),
        )
    if line.get("method") != "POST":
        return Problem(number, "invalid_request", "method", 'is missing or another; write "POST"')
    return Problem(
        number,
        "invalid_request",
        "body",
        ("is missing or cannot be read; write the endpoint's request as a JSON object"),
    )


def _settings_shape_problem(raw: bytes, number: int) -> Problem | None:
    """The problem of a `stoker` object that cannot be read."""
    line = msgspec.json.decode(raw)
    stoker = line.get("stoker") if isinstance(line, dict) else None
    if stoker is None:
        return None
    known = ", ".join(_SETTINGS_RULES)
    if not isinstance(stoker, dict):
        return Problem(number, "invalid_request", "stoker", f"is {_kind(stoker)}; write an object with any of {known}")
    for name in stoker:
        if name not in _SETTINGS_RULES:
            field = f"stoker.{_shown(name[:SHOWN_CHARACTERS])[1:-1]}"  # escaped: Postgres stores no NUL
            return Problem(number, "invalid_request", field, f"is unknown; known are {known}")
    for name, value in stoker.items():
        try:
            msgspec.convert({name: value}, LineSettings)
        except msgspec.ValidationError:
            given = _shown(value) if name == "cache" and isinstance(value, str) else _kind(value)
            fault = f"is {given if value or value == 0 else 'empty'}; it {_SETTINGS_RULES[name]}"
            return Problem(number, "invalid_request", f"stoker.{name}", fault)
    return None


def _custom_id_fault(custom_id: object) -> str | None:
    if not isinstance(custom_id, str):
        return f"is {_kind(custom_id)}; write a string, in quotes"
    if len(custom_id) > CUSTOM_ID_CHARACTERS:
        return f"has {len(custom_id):,} characters; use at most {CUSTOM_ID_CHARACTERS}"
    if "\0" in custom_id:
        return r"holds \u0000, which Postgres cannot store; leave it out"
    return None


def _given(body: bytes, name: str) -> str:
    """The refused value if it is a plain one and no prompt, else nothing."""
    if name in _UNSHOWN:
        return ""
    try:
        value = msgspec.json.decode(body)[name]
    except LINE_REFUSALS:
        return ""
    return f"is {_shown(value)}; it" if isinstance(value, int | float | str) else f"is {_kind(value)}; it"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), "a number")


def _is_lax_json(raw: bytes) -> bool:
    """Whether it is JSON but for its surrogates."""
    try:
        json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
