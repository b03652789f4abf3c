"""An answer of the scripted endpoint in pieces: server-sent events, one a word, as OpenAI and vLLM send them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from aiohttp import web

END = b"data: [DONE]\n\n"
_WORD = re.compile(r" ?[^ ]+| ")


def is_asked_for(body: dict[str, Any]) -> bool:
    """Whether the request wants its answer in pieces."""
    return bool(body.get("stream"))


def pieces(answer: dict[str, Any], body: dict[str, Any]) -> list[bytes]:
    """The events of an answer, without [DONE]."""
    is_chat = answer["object"] == "chat.completion"
    kind = {"object": "chat.completion.chunk"} if is_chat else {}
    head = {**{name: answer[name] for name in ("id", "object", "model")}, **kind}
    wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    usage: dict[str, Any] = {"usage": None} if wants_usage else {}
    parts = [part for choice in answer["choices"] for part in (_of_chat(choice) if is_chat else _of_text(choice))]
    events = [{**head, "choices": [part], **usage} for part in parts]
    if wants_usage:
        events.append({**head, "choices": [], "usage": answer["usage"]})
    return [b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events]


async def send(request: web.BaseRequest, events: list[bytes], orders: list[str]) -> web.StreamResponse:
    """The stream, as the orders have it: whole at once, or with a stall, an error or its end in the middle."""
    half = len(events) // 2
    stall = next((float(order.split()[1]) for order in orders if order.startswith("stall ")), None)
    error = next((int(order.split()[1]) for order in orders if order.startswith("error-event ")), None)
    if stall is None and error is None and "cut stream" not in orders:
        return web.Response(body=b"".join(events) + END, content_type="text/event-stream")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"".join(events[:half]))
    if stall is not None:
        await asyncio.sleep(stall)
    if error is not None:
        said = {"error": {"message": "as the script says", "type": "ScriptedError", "code": error}}
        await response.write(b"data: " + msgspec.json.encode(said) + b"\n\n" + END)
    elif stall is not None:
        await response.write(b"".join(events[half:]) + END)
    await response.write_eof()
    return response


def _of_chat(choice: dict[str, Any]) -> list[dict[str, Any]]:
    message = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": message["role"], "content": ""}]
    deltas += [{"reasoning": word} for word in _words(message["reasoning"])]
    deltas += [{"content": word} for word in _words(message["content"])]
    parts = [{"index": choice["index"], "delta": delta, "finish_reason": None} for delta in deltas]
    return [*parts, {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}]


def _of_text(choice: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"index": choice["index"], "text": word, "finish_reason": None} for word in _words(choice["text"])]
    return [*parts, {"index": choice["index"], "text": "", "finish_reason": choice["finish_reason"]}]


def _words(text: str | None) -> list[str]:
    return _WORD.findall(text or "")
