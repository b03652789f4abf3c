"""What must not stand in a log is taken out of it: prompts, answers and secrets, whoever logs them.

Ours log ids, counts and durations. This is for what libraries say, for texts of exceptions, and for the mistake that
somebody will make. It must not be an excuse: a prompt in the middle of a free text cannot be told from the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel

MARK = "[redacted]"
LEAST_SECRET = 6  # characters: a shorter one, such as RabbitMQ's `guest`, would be found in ordinary words
LONGEST = 32_000  # characters of a text, such as a traceback; what is longer is cut

# What a field is called that holds what a tenant wrote or an engine answered, or a secret; never counts: numbers stay.
_NAMES = (
    r"prompts?|messages|bod(?:y|ies)|requests?_body|responses?|contents?|answers?|completions?|inputs?|outputs?|texts?|"
    r"lines?|passages?|payloads?|arguments|headers?|"
    r"authorization|credentials?|cookies?|api_?keys?|pass(?:word|wd)s?|secrets?|(?:access|auth|bearer|refresh)?_?token"
)
_TELLING = re.compile(rf"(?:^|.*[._-])(?:{_NAMES})", re.IGNORECASE)

# A secret or a text that stands in another one: each with the group that stays before it. What begins one is passed at
# once, whether or not its end is found: else a line of nothing but beginnings takes seconds.
_VALUES = re.compile(
    r"""
      (?P<url>   \b[a-z][a-z0-9+.-]{0,20}://[^\s/:@'"]*:) [^\s/'"]+ (?=@)
    | (?P<scheme>\b(?:Bearer|Basic)\s+) [A-Za-z0-9._~+/=:-]{6,}
    | (?P<named> \b(?:api[_-]?key|x-api-key|password|passwd|secret|token)["']?\s*[=:]\s*["']?) [^\s"',;&)}\]]{4,}
    | (?P<key>   \b(?:sk|pk|rk|whsec|hf|lsv2|xox[a-z]|gh[ops])[-_]) [A-Za-z0-9_-]{12,}
    | (?P<pydantic> \binput_value=) (?: .{0,512}? (?=,\ input_type=) | .{1,512} )
    | (?P<postgres> ^(?:DETAIL:|CONTEXT:\ +COPY)\ +) (?s:.*?) (?=\n(?:HINT|CONTEXT):|\n\[SQL|\n\n|\Z)
    | (?P<alchemy>  \[parameters:\ ) .+
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)

# One of these is in all that _VALUES finds: looking for them costs a twentieth.
_SIGNS = (
    *("://", "bearer", "basic", "key", "passw", "secret", "token", "whsec", "lsv2", "xox", "gho", "ghp", "ghs"),
    *("input_value", "detail:", "context:", "parameters"),
    *(f"{start}{line}" for start in ("sk", "pk", "rk", "hf") for line in "-_"),
)
_OURS = frozenset({"level", "logger", "timestamp"})

# What a terminal obeys: C0 but tab and newline, DEL, C1, and those that turn the direction of the text around them.
_OBEYED = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {0x09, 0x0A},
    "\N{REPLACEMENT CHARACTER}",
)


def harmless(text: str) -> str:
    """A text, such as a stranger's name, document or answer, of which a terminal obeys nothing."""
    return text.translate(_OBEYED)


def harmless_fields(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog before what shows an event to people: its texts as `harmless` has them."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = harmless(value)
    return event


class Redaction:
    """A processor of structlog: the same event, without what must not stand in it."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({secret for secret in secrets if len(secret) >= LEAST_SECRET}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Replace values in place."""
        for name, value in event.items():
            if name not in _OURS:
                event[name] = self._field(name, value)
        return event

    def text(self, text: str) -> str:
        """A text without known secrets, and without what looks like one."""
        if len(text) > LONGEST:
            text = f"{text[:LONGEST]}… [{len(text) - LONGEST} characters more]"
        if self._known is not None:
            text = self._known.sub(MARK, text)
        seen = text.lower()
        return _VALUES.sub(_kept, text) if any(sign in seen for sign in _SIGNS) else text

    def _field(self, name: object, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if name != "event" and isinstance(name, str) and _TELLING.fullmatch(name):
            return MARK
        return self._value(value)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._field(key, one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._field(None, one) for one in value]
        return self.text(str(value))


def secrets_of(settings: BaseModel) -> Iterator[str]:
    """Every secret that the settings hold: keys, passwords, and those inside URLs, also as they stand there."""
    for name, value in settings:
        if isinstance(value, BaseModel):
            yield from secrets_of(value)
        elif isinstance(value, str) and name.endswith(("api_key", "password")):
            yield value
        elif isinstance(value, str) and "://" in value and (written := urlsplit(value).password):
            yield from (written, unquote(written))


def _kept(found: re.Match[str]) -> str:
    return f"{found[found.lastgroup or 0]}{MARK}"
