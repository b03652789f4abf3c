"""How inputs are changed: JSON by its nodes, anything by its bytes, and both made long by repeating a part.

libFuzzer changes bytes, and of such changes most only break the JSON. Deterministic for a given Random.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 0.0, 1.0, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**53 + 1, 2**63, 2**64, 10**40),
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\ud83d",
        "\ude00",
        "😀",
        "\u2028",
        "\x7f",
        "ﬁ",
        "é",
        "x" * 600,
        "{slot}",
        "{a}{b}",
        "$ref",
    ),
    *([], {}, [[]], [{}], {"": None}, [0, "", None], [1, 2, 3], ["a", ["b"]], [[1], [2]]),
    *("length", "stop", "text", "thinking", "semantic", "off", "external", "base64", "float", "object", "array"),
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "#/$defs/a", "chat.completion", "1e999", "400"),
)
TOKENS: Final = (
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"1E400", b"0.1e1", b"\\ud800", b"\\u0000", b"\\ud83d\\ude00", b"\\q"),
    *(b"\xef\xbb\xbf", b"\xff", b"\xc0\x80", b"\0", b"\r\n", b"\r", b"\n\n", b"\t", b"\x0b", b"\xc2\x85", b"9" * 20),
    *(b"data: ", b"data: [DONE]\n\n", b"--", b'""', b'"', b",", b":", b"{", b"}", b"[", b"]", b"0", b" ", b"\\"),
)

PARTS: Final = (b"[", b'{"a":', b"[{},", b"9", b" ", b"\n", b"\\", b'"', b"a.", b"a@", b"-", b"(", b"\xf0\x9f\x98\x80")


def mutated(content: bytes, rng: random.Random, *, head_bytes: int, is_json: bool) -> bytes:
    """One to four changes."""
    head, rest = bytearray(content[:head_bytes]), content[head_bytes:]
    for _ in range(rng.choice((1, 1, 2, 4))):
        rest = (_json_changed(rest, rng) if is_json and rng.random() < 0.6 else None) or _bytes_changed(rest, rng)
    if head and rng.random() < 0.3:
        head[rng.randrange(len(head))] = rng.randrange(256)
    return bytes(head) + rest


def stretched(content: bytes, rng: random.Random, *, head_bytes: int, most_bytes: int) -> bytes:
    """The content with a part repeated until it is long: what takes time that grows faster than that shows here."""
    head, rest = content[:head_bytes], content[head_bytes:]
    start = rng.randrange(len(rest) + 1)
    part = rest[start : start + rng.choice((1, 1, 2, 3, 8, 40, len(rest) + 1))]
    if not part or rng.random() < 0.2:
        part = rng.choice(PARTS)
    times = max(1, (most_bytes - len(rest)) // len(part))
    return head + rest[:start] + part * times + rest[start:]


def _json_changed(content: bytes, rng: random.Random) -> bytes | None:
    """One line of JSON with a node changed; None if no line is JSON."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    start = lines[at].find(b"{")
    if start < 0:
        return None
    try:
        value = json.loads(lines[at][start:])
    except (ValueError, RecursionError):
        return None
    changed = _changed(value, rng, depth=0)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.7, separators=rng.choice(((",", ":"), (", ", " : "))))
    lines[at] = lines[at][:start] + text.encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _changed(value: Any, rng: random.Random, *, depth: int) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < (0.9 if depth < 3 else 0.5):
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        place = rng.choice(places)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        way = rng.random()
        if way < 0.1:
            del copy[place]
        elif way < 0.2 and isinstance(copy, dict):
            copy[str(rng.choice(VALUES))] = copy[place] if rng.random() < 0.5 else rng.choice(VALUES)
        elif way < 0.3 and isinstance(copy, list):
            copy += copy[: rng.choice((1, 4, 60))]
        else:
            copy[place] = _changed(copy[place], rng, depth=depth + 1)
        return copy
    way = rng.random()
    if way < 0.1:
        return [value]
    if way < 0.2 and isinstance(value, str):
        return value + str(rng.choice(VALUES))
    if way < 0.3 and isinstance(value, int):
        return value + rng.choice((-1, 1, 0.5, 10**6))
    return rng.choice(VALUES)


def _bytes_changed(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    until = min(len(content), at + rng.choice((0, 1, 1, 2, 8, 64)))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: content[:at] + rng.choice(TOKENS) + content[until:],
        lambda: content[:at] + content[until:],
        lambda: content[:at],
        lambda: content[:at] + content[at:until] * rng.choice((2, 3, 9)) + content[until:],
        lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        lambda: content[until:] + content[:until],
    )
    return rng.choice(ways)()
