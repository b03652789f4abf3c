"""Whether a refusal speaks of our account (its quota, its key) or of the request: pure functions of status and body.

It must not believe what a request's author may have written: an error may quote the prompt, so codes count, and
messages only by their beginnings, or with statuses that no prompt can bring about.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

# Their words: OpenAI, Azure OpenAI, Anthropic (400), OpenRouter and DeepSeek (402), xAI (403).
_QUOTA_CODES: Final = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",
        "insufficient_credits",
        "insufficient_balance",
        "credits_exhausted",
        "quota_exceeded",
        "quotaexceeded",
    }
)
_QUOTA_WORDS: Final = re.compile(
    r"insufficient[ _](quota|credits|balance|funds)|billing hard limit|out of call volume quota|spending limit"
    r"|used all available credits|requires more credits|credit balance is too low",
    re.IGNORECASE,
)
_POOR: Final = "Your credit balance is too low"  # Anthropic says so with 400
_OF_THE_REQUEST: Final = re.compile(r"moderation|flagged|content.?(policy|filter)|safety", re.IGNORECASE)
_SIZE_READ: Final = 64 * 1024


def is_about_quota(status: int, body: bytes) -> bool:
    """Whether what our account may spend is spent, as it is not with too many requests a minute."""
    if status == 402:
        return True
    if status not in (400, 401, 403, 429):
        return False
    codes, message = _said(body)
    if not _QUOTA_CODES.isdisjoint(codes):
        return True
    return message.startswith(_POOR) if status == 400 else bool(_QUOTA_WORDS.search(message))


def is_about_the_key(status: int, body: bytes) -> bool:
    """Whether the key is refused; a 403 may be of what the request says instead."""
    if status == 401:
        return True
    if status != 403:
        return False
    codes, message = _said(body)
    return not any(map(_OF_THE_REQUEST.search, [*codes, message]))


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None
    message: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None
    message: str | None = None
    code: str | int | None = None


_REFUSAL: Final = msgspec.json.Decoder(_Refusal)


def _said(body: bytes) -> tuple[set[str], str]:
    """(codes in lower case, message) of an error in any of the forms that servers use."""
    try:
        refusal = _REFUSAL.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return set(), body[:_SIZE_READ].decode(errors="replace")
    error = refusal.error
    if isinstance(error, _Error):
        codes, message = (error.code, error.type), error.message or ""
    else:
        codes, message = (refusal.code, None), error or refusal.message or ""
    return {code.lower() for code in codes if isinstance(code, str)}, message
