"""Targets of what clients send: lines, batch files, single requests, create bodies, schemas, uploads, ids."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedReader, FileIO
from typing import Any, Final

import msgspec
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from python_multipart.exceptions import MultipartParseError

from api.app import _as_api_error
from api.errors import MESSAGE_CHARACTERS as SHOWN_CHARACTERS
from api.errors import PARAM_CHARACTERS, ApiError
from api.uploads import FIELD_BYTES, MOST_FIELDS, NAME_CHARACTERS, Upload, _Form
from models.batch_requests import CreateBatch
from models.file_names import is_upload, made_name, read_made_name, upload_name
from models.keys import parse_key
from models.line_settings import LineSettings, read_settings
from models.lines import ENDPOINTS, LineRules, ParsedLine, SubmitOptions, parse_line, parse_sets
from models.money import nanos_of
from models.names import read_request_name, request_name
from models.singles import read_single
from models.states import CacheMode
from pipeline.batch_file import BatchFile, SkippingBatchFile, read_lines
from pipeline.forms import answer_schema
from pipeline.validate import submit_options
from runtime.errors import BadInput, InvalidFile, Problem
from runtime.settings import Settings
from tests.fuzz.target import MESSAGE_CHARACTERS, Target, check_problem, check_text, pieces_of, strict

CHAT, TEXT, EMBEDDINGS = ENDPOINTS
SETS: Final = {"temperature": 0, "user": "someone"}
LINE_BYTES: Final = 1 << 22

RULES: Final = (
    LineRules(SubmitOptions(max_output_tokens=4096), line_bytes=LINE_BYTES),
    LineRules(SubmitOptions(max_output_tokens=7, model="m2", sets=SETS), line_bytes=LINE_BYTES),
    LineRules(SubmitOptions(max_output_tokens=4096, cache=CacheMode.OFF), line_bytes=300),
    LineRules(
        SubmitOptions(
            max_output_tokens=64, cache=CacheMode.SEMANTIC, settings={"template": "Sort: {text}", "collection": "c"}
        ),
        line_bytes=LINE_BYTES,
        sampled=True,
    ),
    LineRules(SubmitOptions(max_output_tokens=100, validate_answers=True), line_bytes=LINE_BYTES),
)
LIMITS: Final = ("max_completion_tokens", "max_tokens")


def line(data: bytes) -> None:
    """A line that is accepted is JSON to every reader, says what we say it does, and is changed as the options say."""
    rules, endpoint = RULES[data[0] % len(RULES)], (None, *ENDPOINTS)[data[0] // 8 % 4]
    raw = data[1:]
    found = parse_line(raw, 3, rules=rules, endpoint=endpoint)
    if isinstance(found, Problem):
        check_problem(found, line=3)
        return
    assert endpoint in (None, found.url)
    assert len(raw.rstrip(b"\r\n")) <= rules.line_bytes
    with suppress(RecursionError):  # it was just not too deep to be read from a shallower stack
        _check_line(found, strict(raw), rules)


def _check_line(found: ParsedLine, stated: dict[str, Any], rules: LineRules) -> None:
    assert (found.custom_id, found.url) == (stated["custom_id"], stated["url"])
    assert stated["method"] == "POST"
    assert found.url in ENDPOINTS
    assert found.prompt_tokens >= 0
    check_text(found.custom_id, most=512)
    body, options = strict(found.body), rules.options
    wished = stated["body"] | options.sets | ({} if options.model is None else {"model": options.model})
    assert body["model"] == wished["model"] == found.model
    assert _without(body, LIMITS) == _without(wished, LIMITS)
    settings = LineSettings() if found.stoker is None else read_settings(found.stoker)
    _check_settings(settings, stated.get("stoker"), rules)
    if found.url == EMBEDDINGS:
        assert body == wished
        assert found.output_tokens == 0
    else:
        tokens = _limit_of(body, wished, found.url, most=options.max_output_tokens)
        assert found.output_tokens == tokens * _answers(body, settings)
        assert type(found.output_tokens) is int
    _check_sharing(found, settings, rules)


def _limit_of(body: dict[str, Any], wished: dict[str, Any], url: str, *, most: int) -> int:
    """The tokens that one completion may have, which is the wish where that is allowed."""
    newer, older = (body.get(name) for name in LIMITS)
    for name in LIMITS if url == CHAT else LIMITS[1:]:
        limit, wish = body.get(name), wished.get(name)
        assert limit is None or 1 <= limit <= most
        assert wish is None or limit == min(wish, most)
    limit = newer if url == CHAT and newer is not None else older
    assert limit is not None
    return int(limit)


def _answers(body: dict[str, Any], settings: LineSettings) -> int:
    prompt = body.get("prompt", "")
    prompts = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) or "messages" in body else len(prompt)
    return int(body.get("n") or 1) * prompts * len(settings.turns or "1")


def _check_settings(settings: LineSettings, stated: Any, rules: LineRules) -> None:
    """What a line states is what is stored; what it leaves out is the batch's."""
    kept = msgspec.to_builtins(settings)
    for name, value in (stated or {}).items():
        assert value is None or kept[name] == value, name
    assert kept.keys() <= (stated or {}).keys() | rules.options.settings.keys()


def _check_sharing(found: ParsedLine, settings: LineSettings, rules: LineRules) -> None:
    """An answer is shared only where one plain answer is asked for, which the engine would give again."""
    if not found.may_share:
        return
    assert found.cache is not CacheMode.OFF
    assert not settings.stands_alone
    if found.url == EMBEDDINGS:
        return
    with suppress(ValueError, RecursionError):  # the cache's rules, written a second time
        fields = strict(found.body)
        assert fields.get("n") in (None, 0, 1) and not fields.get("tools") and not fields.get("functions")
        assert rules.sampled or fields.get("temperature") == 0 or fields.get("seed") is not None


def _without(body: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def batch_file(data: bytes) -> None:
    """Its lines are the same however it is read; all are good, or it is refused with its problems, in order."""
    rules, content = RULES[data[0] % len(RULES)], data[1:]
    descriptor = os.memfd_create("fuzzed")
    try:
        os.write(descriptor, content)
        expected = _lines_of(content, line_bytes=rules.line_bytes)
        for buffer_bytes in (1 + data[0] // 16, 1 << 20):
            with _reader(descriptor, buffer_bytes) as file:
                file.seek(0)
                assert list(read_lines(file, line_bytes=rules.line_bytes)) == expected
        whole, problems, total = _read_whole(descriptor, rules)
        kept, skipped = _read_skipping(descriptor, rules)
    finally:
        os.close(descriptor)
    assert len({one.custom_id for one in kept}) == len(kept)
    assert len(kept) + skipped <= len(expected)
    if not total:
        assert (kept, skipped) == (whole, 0)
        assert len(whole) == len(expected)
    lines = [problem.line or 0 for problem in problems]
    assert lines == sorted(lines)
    assert len(problems) <= min(total, 20)


def _reader(descriptor: int, buffer_bytes: int) -> BufferedReader:
    return BufferedReader(FileIO(descriptor, closefd=False), buffer_bytes)


def _lines_of(content: bytes, *, line_bytes: int) -> list[tuple[int, bytes]]:
    """What read_lines is to give, by another way: of long lines the beginning, of blank ones nothing."""
    lines = [one[: line_bytes + 2] for one in content.removesuffix(b"\n").split(b"\n")] if content else []
    ends = [b"\n"] * (len(lines) - 1) + [b"\n" if content.endswith(b"\n") else b""]
    whole = [(one + end)[: line_bytes + 2] for one, end in zip(lines, ends, strict=False)]
    if whole:
        whole[0] = whole[0].removeprefix(b"\xef\xbb\xbf")
    return [(number, one) for number, one in enumerate(whole, 1) if one and not one.isspace()]


def _read_whole(descriptor: int, rules: LineRules) -> tuple[list[ParsedLine], list[Problem], int]:
    lines: list[ParsedLine] = []
    with _reader(descriptor, 1 << 16) as file:
        try:
            lines.extend(BatchFile(file, rules=rules, served_models=None, on_progress=None))
        except InvalidFile as error:
            for problem in error.problems:
                check_problem(problem, line=problem.line)
            assert error.problems
            return lines, error.problems, error.total
    return lines, [], 0


def _read_skipping(descriptor: int, rules: LineRules) -> tuple[list[ParsedLine], int]:
    heard: list[Problem] = []
    kept: list[ParsedLine] = []
    with _reader(descriptor, 1 << 16) as file:
        source = SkippingBatchFile(file, rules=rules, served_models=None, on_progress=None, on_skipped=heard.append)
        try:
            kept.extend(source)
        except InvalidFile:
            assert not kept
    for problem in heard:
        check_problem(problem, line=problem.line)
    assert source.skipped == len(heard)
    return kept, source.skipped


def single(data: bytes) -> None:
    """A single request is held to what a line is held to, and says nothing of lines."""
    path = ENDPOINTS[data[0] % 3]
    found = read_single(data[1:], path, max_output_tokens=64)
    if isinstance(found, Problem):
        check_problem(found, line=None)
        _encoded(ApiError(400, f"{found.field} {found.message}", param=found.field, code=found.code))
        return
    with suppress(RecursionError):
        body, stated = strict(found.body), strict(data[1:])
        assert body["model"] == found.model == stated["model"]
        ours = ("stoker", "stream", "stream_options")
        assert not body.keys() & set(ours)
        assert _without(body, LIMITS) == _without(stated, (*ours, *LIMITS))
        assert found.streams == bool(stated.get("stream"))


def create_body(data: bytes) -> None:
    """A create body is refused in words that can be sent, or is stored and read back as it was."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):  # FastAPI's way, and its answer
        return
    try:
        asked = CreateBatch.model_validate(given)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        _encoded(_as_api_error(RequestValidationError(faults)))
        return
    stored = asked.model_dump(mode="json", exclude_unset=True)
    text = json.dumps(stored)
    assert r"\u0000" not in text.replace(r"\\", "")
    text.encode("latin-1")
    json.dumps(stored, ensure_ascii=False).encode()
    assert CreateBatch.model_validate(json.loads(text)) == asked
    assert asked.window.total_seconds() >= 1
    assert len(asked.digest(key_id="k", file_digest="d")) == 64
    assert asked.extras.budget_money is None or nanos_of(asked.extras.budget_money) > 0
    rules = LineRules(submit_options(asked, SETTINGS), line_bytes=1)
    assert rules.settings is None or msgspec.to_builtins(rules.settings) == asked.extras.line_settings


SETTINGS: Final = Settings()


def _encoded(error: ApiError) -> None:
    """What the gateway answers with it; it can be sent, and is not as long as what was sent."""
    body = JSONResponse(error.answer.model_dump(), status_code=error.status_code).body
    told = json.loads(bytes(body))["error"]
    assert 0 < len(told["message"]) <= SHOWN_CHARACTERS
    assert len(told["param"] or "") <= PARAM_CHARACTERS


def schema(data: bytes) -> None:
    """A schema is refused with ValueError, or answers are held to it within the steps that are stated."""
    text, _, answer = data.partition(b"\n")
    answer_schema.cache_clear()  # else memory grows with the schemas of the run
    try:
        form = answer_schema(text)
    except ValueError as error:
        check_text(str(error), most=MESSAGE_CHARACTERS)
        return
    fault = form.fault(answer.decode(errors="replace"))
    if fault is not None:
        assert fault
        check_text(fault, most=MESSAGE_CHARACTERS)
    else:
        strict(answer.decode(errors="replace"))


class _Kept(io.BytesIO):
    """Stands where an upload's blob is written."""

    def discard(self) -> None:
        self.truncate(0)


BOUNDARY: Final = b"bound"


def upload(data: bytes) -> None:
    """A form is the same however it comes in pieces, keeps within its bounds, and its file comes out byte by byte."""
    cuts, body = data[:4], data[4:]
    whole, pieces = _form_of((body,)), _form_of(pieces_of(body, cuts))
    if body.lstrip(b"\r\n").startswith(b"--" + BOUNDARY):  # what stands before it, python-multipart takes as it comes
        assert whole == pieces


def _form_of(pieces: Iterable[bytes]) -> tuple[Any, ...] | None:
    """The form's parts; None if it was refused: with which words may depend on the pieces, in python-multipart."""
    kept = _Kept()
    found = Upload(kept)  # type: ignore[arg-type]
    form = _Form(found, BOUNDARY, most_bytes=1 << 16)
    try:
        for piece in pieces:
            form.feed(piece)
        form.end()
    except MultipartParseError:
        return None
    except ApiError as error:
        _encoded(error)
        return None
    assert 0 < len(found.filename or "") <= NAME_CHARACTERS
    assert found.filename is not None
    assert "/" not in found.filename
    assert found.filename.isprintable() or not found.filename.isascii()
    assert len(found.fields) <= MOST_FIELDS and all(len(value) <= FIELD_BYTES for value in found.fields.values())
    assert found.size_bytes == len(kept.getvalue()) <= 1 << 16
    return found.filename, found.fields, found.digest, kept.getvalue()


def names(data: bytes) -> None:
    """What is taken for an id or a key is one, and is written as it was read."""
    text = data.decode(errors="replace")
    if (request := read_request_name(text)) is not None:
        assert int(request_name(*request).rpartition("_")[2]) == int(text.rpartition("_")[2])
    if (made := read_made_name(text)) is not None:
        assert made_name(*made) == text
        assert not is_upload(text)
    if is_upload(text):
        assert upload_name(read_made_name(f"{text}-input")[0]) == text  # type: ignore[index]
    if (key := parse_key(text)) is not None:
        assert text.startswith(f"sk-{key.id}-")
        assert text.isascii() and len(text) == 59
        assert len(key.digest) == 32
    with suppress(BadInput):
        for name, value in parse_sets([text]).items():
            assert text.startswith(f"{name}=")
            msgspec.json.encode({name: value})


def _line(url: str, /, body: Any, **more: Any) -> bytes:
    return json.dumps({"custom_id": "a-1", "method": "POST", "url": url, "body": body, **more}).encode()


_ASKED: Final = {"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Sort: é"}]}
_BODIES: Final = (
    (CHAT, {**_ASKED, "max_tokens": 9, "temperature": 0, "seed": 1, "n": 2, "tools": [], "top_p": 0.5}),
    (CHAT, {**_ASKED, "max_completion_tokens": 5000, "max_tokens": 8, "stream": False, "logit_bias": {"1": 2}}),
    (TEXT, {"model": "m", "prompt": ["a", "b"], "presence_penalty": -2, "frequency_penalty": 2.0, "user": "u"}),
    (TEXT, {"model": "m", "prompt": [1, 2], "top_logprobs": 3, "priority": 0, "max_tokens": None}),
    (EMBEDDINGS, {"model": "m", "input": "x", "encoding_format": "base64"}),
)
_SETTINGS: Final = (
    {"cache": "semantic", "template": "Sort: {text}", "variables": {"text": "é"}, "sources": ["a.pdf"]},
    {"turns": ["one", "two"], "conversation": "batch_req_" + "0" * 32 + "_7", "window_tokens": 64},
    {"collection": "c", "top_k": 5, "query": "q", "context_tokens": 16},
    {"recipe": "classify", "document": 1, "options": {"labels": ["a", "b"]}},
)
_LINES: Final = (
    *(_line(url, body) for url, body in _BODIES),
    *(_line(CHAT, _ASKED, stoker=settings) for settings in _SETTINGS),
)
_FORMED: Final = {
    **_ASKED,
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/a", "$defs": {"a": True}}}},
}
_SCHEMA: Final = {
    "type": "object",
    "properties": {
        "a": {"$ref": "#/$defs/a"},
        "b": {"type": "array", "items": {"enum": [1, "x"]}, "uniqueItems": True},
    },
    "required": ["a"],
    "$defs": {"a": {"type": "string", "pattern": "^[a-c]+$", "maxLength": 3}},
    "anyOf": [{"minProperties": 1}, {"not": {"const": None}}],
}
_CREATE: Final = {
    "input_file_id": "file-" + "0" * 32,
    "endpoint": CHAT,
    "completion_window": "24h",
    "metadata": {"a": "b"},
    "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    "stoker": {
        **{"cache": "off", "template": "T {x}", "collection": "c", "top_k": 3, "context_tokens": 99, "model": "m"},
        **{"max_output_tokens": 5, "priority": "high", "weight": 2.0, "order": "file", "budget_tokens": 10},
        **{"trust": "external", "budget_money": 1.5, "webhook": {"url": "https://a.example/x"}, "labels": {"k": "v"}},
    },
}
_FORM: Final = (
    b'--bound\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a/in.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n{}\n{}\r\n--bound--\r\n"
)

TARGETS: Final = {
    "line": Target("a line of a batch file", line, tuple(b"\0" + one for one in _LINES)),
    "file": Target(
        "a batch file, refused as a whole or with its bad lines left out",
        batch_file,
        (
            b"\0" + b"\n".join(_LINES[:2]),
            b"\2\xef\xbb\xbf" + _LINES[0] + b"\r\n\n" + _LINES[0],
            b"\4" + _line(CHAT, _FORMED),
        ),
        s_per_mb=6.0,
    ),
    "single": Target(
        "a single request",
        single,
        (
            *(bytes([at // 2]) + json.dumps(body).encode() for at, (_, body) in enumerate(_BODIES)),
            b"\0" + json.dumps({**_ASKED, "stream": True, "stoker": {"trust": "external"}}).encode(),
        ),
    ),
    "create": Target("the body that creates a batch", create_body, (json.dumps(_CREATE).encode(),), head_bytes=0),
    "schema": Target(
        "a JSON schema, and an answer that is held to it",
        schema,
        (json.dumps(_SCHEMA).encode() + b'\n{"a":"abc","b":[1,"x"]}', b'{"type":"object"}\n{"a":[]}'),
        head_bytes=0,
        most_bytes=1 << 16,
        s_per_mb=30.0,
    ),
    "upload": Target("a form with a file, in pieces", upload, (b"\0\1\7\50" + _FORM,), head_bytes=4, is_json=False),
    "names": Target(
        "ids, keys and --set",
        names,
        (
            *(b"file-" + b"0a" * 16 + part for part in (b"", b"-output", b"-errors")),
            *(b"batch_req_" + b"0a" * 16 + b"_12", b"sk-0123456789ab-" + b"A" * 43, b"temperature=0", b'a={"b":1}'),
        ),
        head_bytes=0,
        is_json=False,
    ),
}
