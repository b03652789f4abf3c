"""What an answer's headers say of limits: when to come again, and how much of a minute's share is left.

It reads the words of OpenAI and who follows it, of Anthropic, and of the IETF's drafts (RateLimit, RateLimit-Policy).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from inference.connections import Answer
from models.endpoints import RatesSeen
from runtime.clock import utc_now

_MINUTE_S: Final = 60.0
_MOST: Final = 1e15  # a count that Redis's Lua keeps exactly; a higher one is a mistake
_LONGEST_S: Final = 86_400.0  # quotas are of a day at the most; a longer time is a mistake, such as an epoch
_STARTS: Final = (b"x-ratelimit-", b"anthropic-ratelimit-", b"ratelimit")
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_PARAMETER: Final = re.compile(r";\s*([a-z]+)=(\d+)")


def retry_after_s(answer: Answer) -> float | None:
    """The wish in `retry-after-ms` (OpenAI, Azure) or `Retry-After` (RFC 9110: seconds or a date); a day at most."""
    return _a_day_at_most(_wish_s(answer))


def rates_seen(answer: Answer) -> RatesSeen | None:
    """What the headers say, of a minute; None if they say nothing of limits."""
    said: dict[str, str] = {}
    for name, value in answer.headers:
        lowered = name.lower()
        if lowered.startswith(_STARTS):
            said.setdefault(lowered.decode("latin-1"), value.decode("latin-1").strip())
    if not said:
        return None
    seen = (_of_openai(said), _of_anthropic(said), _of_ietf(said))
    return next((rates for rates in seen if rates is not None), None)


def _wish_s(answer: Answer) -> float | None:
    milliseconds = _number(answer.header("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    wish = answer.header("Retry-After")
    seconds = _number(wish)
    if seconds is not None or wish is None:
        return seconds
    try:
        moment = parsedate_to_datetime(wish)
    except (ValueError, OverflowError):
        return None
    return _until(moment)


def _of_openai(said: Mapping[str, str]) -> RatesSeen | None:
    return _rates(said, requests="x-ratelimit-{}-requests", tokens="x-ratelimit-{}-tokens")


def _of_anthropic(said: Mapping[str, str]) -> RatesSeen | None:
    tokens = "anthropic-ratelimit-tokens-{}"
    if tokens.format("limit") not in said:
        tokens = "anthropic-ratelimit-input-tokens-{}"
    return _rates(said, requests="anthropic-ratelimit-requests-{}", tokens=tokens)


def _of_ietf(said: Mapping[str, str]) -> RatesSeen | None:
    """`RateLimit: "x";r=50;t=30` with `RateLimit-Policy: "x";q=100;w=60`, or the older three headers."""
    limit = _count(said.get("ratelimit-limit", "").partition(",")[0].partition(";")[0])
    remaining, reset_s = _count(said.get("ratelimit-remaining")), _duration_s(said.get("ratelimit-reset"))
    state = _parameters(said.get("ratelimit", ""))
    policy = _parameters(said.get("ratelimit-policy", "") or said.get("ratelimit-limit", ""))
    remaining = state.get("r", remaining)
    reset_s = float(state["t"]) if "t" in state else reset_s
    limit = policy.get("q", limit)
    window_s = policy.get("w", 0)
    if limit is not None and window_s:
        limit = max(1, round(limit * _MINUTE_S / window_s))
    if limit is None and remaining is None:
        return None
    return RatesSeen(limit_requests=limit, remaining_requests=remaining, reset_requests_s=_a_day_at_most(reset_s))


def _rates(said: Mapping[str, str], *, requests: str, tokens: str) -> RatesSeen | None:
    limit_requests, remaining_requests, reset_requests_s = _three(said, requests)
    limit_tokens, remaining_tokens, reset_tokens_s = _three(said, tokens)
    if limit_requests is remaining_requests is limit_tokens is remaining_tokens is None:
        return None
    return RatesSeen(
        limit_requests=limit_requests,
        remaining_requests=remaining_requests,
        reset_requests_s=reset_requests_s,
        limit_tokens=limit_tokens,
        remaining_tokens=remaining_tokens,
        reset_tokens_s=reset_tokens_s,
    )


def _three(said: Mapping[str, str], pattern: str) -> tuple[int | None, int | None, float | None]:
    """(limit, remaining, reset in seconds). A limit of more than a minute, as Groq's of a day, is not told as one."""
    limit, remaining = (_count(said.get(pattern.format(word))) for word in ("limit", "remaining"))
    reset_s = _a_day_at_most(_duration_s(said.get(pattern.format("reset"))))
    return None if reset_s is not None and reset_s > _MINUTE_S else limit, remaining, reset_s


def _parameters(field: str) -> dict[str, int]:
    """Of the first item of a structured field."""
    found = {name: _count(value) for name, value in _PARAMETER.findall(field.partition(",")[0])}
    return {name: count for name, count in found.items() if count is not None}


def _duration_s(text: str | None) -> float | None:
    """Seconds in `6m0s`, `20ms`, `1.5` or a moment as `2026-01-01T00:00:00Z`."""
    if not text:
        return None
    if _DURATION.fullmatch(text):
        return _bounded(sum(float(number) * _UNITS_S[unit] for number, unit in _PART.findall(text)))
    seconds = _number(text)
    if seconds is not None:
        return seconds
    try:
        return _until(datetime.fromisoformat(text))
    except ValueError:
        return None


def _until(moment: datetime) -> float | None:
    try:
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - utc_now()).total_seconds())
    except OverflowError:
        return None


def _a_day_at_most(seconds: float | None) -> float | None:
    return None if seconds is None else min(seconds, _LONGEST_S)


def _count(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return _bounded(number)


def _bounded(number: float) -> float | None:
    return max(0.0, number) if math.isfinite(number) and number <= _MOST else None
