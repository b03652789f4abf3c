"""A whole answer as an event stream: what a client gets that asked for `stream`, once the answer is there."""

from __future__ import annotations

import json
from typing import Any

EVENTS = "text/event-stream"


def events_of(response: str, *, with_usage: bool) -> str:
    """The events of a chat's or completion's answer: all of it in one chunk, its usage if asked for, and the end.

    Raises ValueError for an answer that has not the form of one, or a number that not every reader takes.
    """
    try:
        return _events(json.loads(response), with_usage=with_usage)
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"no form that events can have: {error}") from error


def _events(answer: Any, *, with_usage: bool) -> str:
    usage = answer.pop("usage", None)
    if answer.get("object") == "chat.completion":
        answer["object"] = "chat.completion.chunk"
        answer["choices"] = [_delta_of(choice) for choice in answer.get("choices", [])]
    chunks = [answer | ({"usage": None} if with_usage else {})]
    if with_usage:
        chunks.append(answer | {"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk, allow_nan=False)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def _delta_of(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.pop("message", None) or {}
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return {**choice, "delta": message}
