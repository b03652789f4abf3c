"""What the scripted endpoint says to a prompt: pure functions, the same answer at every call."""

from __future__ import annotations

import hashlib
import math
import statistics
from array import array
from base64 import b64encode
from typing import Any

DIMENSIONS = 8
THOUGHTS = "thinking it over"


def drawn_latency_s(prompt: str, *, median_s: float, sigma: float) -> float:
    """A lognormal service time, drawn from the prompt."""
    share = (int.from_bytes(digest(prompt, 4)) + 0.5) / 2**32
    return median_s * math.exp(sigma * statistics.NormalDist().inv_cdf(share))


def prompts_of(body: dict[str, Any], path: str) -> list[str]:
    """What the call is about: the last user message, or each text; token ids as the text of their list."""
    if path == "/v1/chat/completions":
        return [next(_text_of(turn) for turn in reversed(body["messages"]) if turn["role"] == "user")]
    given = body["input"] if path == "/v1/embeddings" else body["prompt"]
    is_list_of_prompts = isinstance(given, list) and not isinstance(given[0], int)
    return [str(text) for text in given] if is_list_of_prompts else [str(given)]


def completion(body: dict[str, Any], path: str, prompts: list[str], orders: list[str]) -> tuple[dict[str, Any], int]:
    """(the answer, how many tokens it took) of a chat or a completion."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 2**31
    is_chat = path == "/v1/chat/completions"
    thoughts = THOUGHTS if "reasoning" in orders else None
    reasoning_tokens = len(THOUGHTS.split()) if thoughts else 0
    said = [order.removeprefix("answer ") for order in orders if order.startswith("answer ")]
    choices = []
    completion_tokens = 0
    for index, prompt in enumerate(prompts * (body.get("n") or 1)):
        words = [] if "empty" in orders else (said[-1] if said else f"echo: {prompt}").split(" ")
        kept = words[: max(0, limit - reasoning_tokens)]
        text = " ".join(kept)
        completion_tokens += len(kept) + reasoning_tokens
        finish = "length" if len(kept) < len(words) else "stop"
        choice: dict[str, Any] = {"index": index, "finish_reason": finish}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text or None, "reasoning": thoughts}
        else:
            choice["text"] = text
        choices.append(choice)
    asked = [_text_of(turn) for turn in body["messages"]] if is_chat else prompts
    prompt_tokens = sum(len(text.split()) for text in asked)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens * len(choices)},
    }
    kind = "chat.completion" if is_chat else "text_completion"
    head = {"id": "scripted", "object": kind, "model": body.get("model")}
    return {**head, "choices": choices, "usage": usage}, completion_tokens


def embeddings(body: dict[str, Any], prompts: list[str], orders: list[str]) -> dict[str, Any]:
    """The vectors of the prompts, as floats or base64 as the body asks."""
    as_base64 = body.get("encoding_format") == "base64" and "plain floats" not in orders
    entries = []
    for index, text in enumerate(prompts):
        vector = array("f", vector_of(text))
        embedding = b64encode(vector).decode() if as_base64 else vector.tolist()
        entries.append({"object": "embedding", "index": index, "embedding": embedding})
    if "swap" in orders:
        entries.reverse()
    tokens = sum(len(text.split()) for text in prompts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": entries, "model": body.get("model"), "usage": usage}


def vector_of(text: str) -> list[float]:
    """The vector that the server gives for a text: float32 values in [-1, 1), the same at every call."""
    return [(byte - 128) / 128 + 0.001 for byte in digest(text, DIMENSIONS)]


def digest(text: str, size_bytes: int) -> bytes:
    """`size_bytes` bytes that depend on the text only."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=size_bytes).digest()


def _text_of(turn: dict[str, Any]) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
