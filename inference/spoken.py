"""Prompts and answers as spans carry them, in the form of the conventions for generative models, cut to a bound.

Only for who asks for them to be seen (STOKER_TRACE__PROMPTS). It must not raise for any body.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

MOST_BYTES: Final = 16 * 1024
# Characters of each text, tried in turn until all of it fits: long prompts are cut, short ones stay whole.
_CUTS: Final = (16_384, 4_096, 1_024, 256, 64)
_MOST: Final = 64  # messages, and parts of one: of more the first and the last ones


def messages_json(body: bytes) -> str:
    """What a request says, as JSON; "" for one that says nothing."""
    return _encoded(body, _messages)


def answers_json(body: bytes) -> str:
    """What an answer's choices say, as JSON; "" for one without any, such as vectors."""
    return _encoded(body, _answers)


def _encoded(body: bytes, said_in: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> str:
    try:
        said = said_in(_fields(body))
        return _within_bound(said) if said else ""
    except RecursionError:  # so deep that it could just be read
        return ""


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(messages := fields.get("messages"), list):
        return [_message(one, "user") for one in _ends(messages)]
    prompt = fields.get("prompt", fields.get("input"))
    if prompt is None:
        return []
    texts = prompt if isinstance(prompt, list) else [prompt]
    return [{"role": "user", "parts": _parts(one)} for one in _ends(texts)]


def _answers(fields: dict[str, Any]) -> list[dict[str, Any]]:
    choices = fields.get("choices")
    said = []
    for one in _ends(choices) if isinstance(choices, list) else []:
        choice = one if isinstance(one, dict) else {}
        message = choice.get("message", {"content": choice.get("text")})
        said.append(_message(message, "assistant") | {"finish_reason": choice.get("finish_reason") or "stop"})
    return said


def _fields(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(message: Any, role: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        return {"role": role, "parts": _parts(message)}
    parts = _parts(message.get("content"))
    calls = message.get("tool_calls")
    for call in _ends(calls) if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        named = function if isinstance(function, dict) else {}
        parts.append({"type": "tool_call", "name": str(named.get("name")), "arguments": str(named.get("arguments"))})
    return {"role": str(message.get("role") or role), "parts": parts}


def _parts(content: Any) -> list[dict[str, str]]:
    """Texts as they are; of images, sounds and files only that they are there."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    if not isinstance(content, list):
        return [{"type": "text", "content": json.dumps(content)}]
    return [
        {"type": "text", "content": one["text"]}
        if isinstance(one, dict) and isinstance(one.get("text"), str)
        else {"type": str(one.get("type", "part")) if isinstance(one, dict) else "part"}
        for one in _ends(content)
    ]


def _ends(items: list[Any]) -> list[Any]:
    return items if len(items) <= _MOST else [items[0], *items[1 - _MOST :]]


def _within_bound(messages: Sequence[dict[str, Any]]) -> str:
    """The JSON within MOST_BYTES: of many messages the first and the last ones, of long texts their beginnings."""
    kept = list(messages)
    while True:
        for most in _CUTS:
            text = json.dumps([_cut(one, most) for one in kept], ensure_ascii=False)
            if len(text.encode("utf-8", "replace")) <= MOST_BYTES:
                return text.encode("utf-8", "replace").decode()  # no lone surrogate: protobuf takes none
        if len(kept) == 1:
            return ""
        kept = [kept[0], *kept[1 + len(kept) // 2 :]]


def _cut(message: dict[str, Any], most: int) -> dict[str, Any]:
    parts = [{key: value[:most] for key, value in part.items()} for part in message["parts"]]
    return message | {"parts": parts}
