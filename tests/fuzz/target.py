"""What a target of the fuzzer is, and the oracles that several share.

A target is a plain function of bytes, so that its findings are replayed without a fuzzer. It raises AssertionError
where a promise is broken; whatever else escapes from the code under test is a finding too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from runtime.errors import Problem

MESSAGE_CHARACTERS: Final = 1_200  # of any one error: it may quote 512 of an id
FIELD_CHARACTERS: Final = 200
INTEGER_DIGITS: Final = 4_000
CODES: Final = frozenset(
    {
        *("invalid_json_line", "missing_custom_id", "duplicate_custom_id", "url_mismatch", "invalid_request"),
        *("model_not_found", "empty_file", "invalid_json", "invalid_value"),
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """`what` is fuzzed is told in the table; the first `head_bytes` of an input choose how the rest is read.

    `most_bytes`: how long an input is made by repeating a part of it; `s_per_mb` of such a one is the most CPU time.
    """

    what: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    head_bytes: int = 1
    is_json: bool = True
    most_bytes: int = 1 << 20
    s_per_mb: float = 2.0


def refuse_constant(name: str) -> NoReturn:
    """For `json.loads`: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no JSON")


def strict(text: str | bytes) -> Any:
    """The value of a text that every reader of JSON takes. Raises ValueError, or RecursionError for a deep one."""
    return json.loads(text, parse_constant=refuse_constant, parse_int=_integer)


def _integer(digits: str) -> int | str:
    """Python reads no more than 4,300 digits; longer ones are compared as text."""
    return int(digits) if len(digits) < INTEGER_DIGITS else digits


def check_text(text: str, *, most: int) -> None:
    """It is not too long, and any column, log and answer takes it: no NUL, no half of a surrogate pair."""
    assert len(text) <= most, f"{len(text)} characters, more than {most}"
    assert "\0" not in text, "holds NUL"
    text.encode()


def check_problem(problem: Problem, *, line: int | None) -> None:
    """A problem names its line, is of a known code, and can be stored and shown."""
    assert problem.line == line, f"of line {problem.line}, not {line}"
    assert problem.code in CODES, problem.code
    check_text(problem.message, most=MESSAGE_CHARACTERS)
    check_text(problem.field or "", most=FIELD_CHARACTERS)


def pieces_of(content: bytes, cuts: bytes) -> Iterator[bytes]:
    """The content in pieces, whose lengths `cuts` says in turn; one by one where it says nothing."""
    at = turn = 0
    while at < len(content):
        step = 1 + (cuts[turn % len(cuts)] if cuts else 0)
        yield content[at : at + step]
        at += step
        turn += 1
