"""Reads a user's calibration file: text lines, or a JSONL batch file of chats. It must not tokenize."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from runtime.errors import BadInput
from scripts.terminal import say

LEAST_LINES = 10  # a fifth is held out: fewer would leave one line to judge by
LEAST_CHARACTERS = 4000  # about 1,000 tokens, 200 of them held out
MOST_BYTES = 64 * 1024**2  # many times what the default 256 sequences of 512 tokens take
HELD_OUT = 5  # the last fifth is not used for calibration

Sample = dict[str, Any]


def read_samples(file: Path) -> list[Sample]:
    """One sample a line, `{"text": …}` or `{"messages": […]}`; chats in a seeded order, as they may be sorted by kind.

    Raises BadInput that names the line and remedy.
    """
    try:
        lines = _read(file).split("\n")  # JSON strings may hold U+2028
    except OSError as error:
        raise BadInput(f"--calibration {file} cannot be read: {error.strerror}; name a text or JSONL file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"--calibration {file} is no UTF-8 at byte {error.start:,}; save it as UTF-8") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise BadInput(f"--calibration {file} is empty; give text lines or chats like those you will run")
    is_batch = file.suffix == ".jsonl" or filled[0][1].lstrip().startswith("{")
    samples = [_sample(file, number, line) if is_batch else {"text": line} for number, line in filled]
    if all("messages" in sample for sample in samples):  # a file may be sorted by kind; texts run on from line to line
        random.Random(0).shuffle(samples)  # noqa: S311
    characters = sum(map(_characters, samples))
    if len(samples) < LEAST_LINES or characters < LEAST_CHARACTERS:
        raise BadInput(
            f"--calibration {file} is too short: {len(samples):,} of at least {LEAST_LINES} lines, {characters:,} of "
            f"at least {LEAST_CHARACTERS:,} characters; add more of what you will run"
        )
    return samples


def _read(file: Path) -> str:
    """The file, or of a larger one its whole lines within MOST_BYTES."""
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        content = content[: content.rindex(b"\n", 0, MOST_BYTES) if b"\n" in content[:MOST_BYTES] else MOST_BYTES]
        say(f"--calibration {file}: its first {MOST_BYTES // 1024**2} MB are read")
    return content.decode("utf-8")


def split(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Those to calibrate with, and the last fifth of them, which is held out for the perplexity."""
    held_out = max(1, len(samples) // HELD_OUT)
    return samples[:-held_out], samples[-held_out:]


def write_samples(file: Path, samples: list[Sample]) -> Path:
    """The samples as JSON lines, as the quantizer reads them."""
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return file


def _sample(file: Path, number: int, line: str) -> Sample:
    place = f"--calibration {file} line {number}"
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{place}: no JSON: {error}; repair it, or give plain text in a .txt file") from error
    body = parsed.get("body", parsed) if isinstance(parsed, dict) else None
    if isinstance(body, dict):
        if isinstance(body.get("text"), str):
            return {"text": body["text"]}
        messages = body.get("messages")
        if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
            return {"messages": [{"role": one["role"], "content": one["content"]} for one in messages]}
        if isinstance(messages, list) and any(_has_parts(message) for message in messages):
            raise BadInput(f"{place}: body.messages: a content in parts; give chats whose contents are plain strings")
    raise BadInput(f"{place}: body.messages: no list of messages with a role and a text content; or give `text`")


def _characters(sample: Sample) -> int:
    """Of what a model reads; a batch file's line has much around it."""
    return len(sample["text"]) if "text" in sample else sum(len(one["content"]) for one in sample["messages"])


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _has_parts(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), list)
