"""Batch files for the acceptance tests, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

MODEL = "scripted"


def chat(custom_id: str, prompt: str, **fields: Any) -> str:
    """One line of a batch file: a chat with one message; `fields` go into its body."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]} | fields
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


def write_chats(file: Path, prompts: Sequence[str]) -> list[str]:
    """A batch file with these prompts: its custom_ids in order, which is not the order of their names."""
    ids = [f"line-{(number * 37) % 1009:04}-{number}" for number in range(len(prompts))]
    file.write_text("".join(chat(custom_id, prompt) for custom_id, prompt in zip(ids, prompts, strict=True)))
    return ids


def prompts(count: int, *, orders: str = "") -> list[str]:
    """As many different prompts."""
    return [f"question {number}{orders}" for number in range(count)]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a result or error file."""
    return parse_lines(file.read_text())


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The lines of a result or error file that was printed."""
    return [json.loads(line) for line in text.splitlines()]


def ids_of(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Their custom_ids in order."""
    return [line["custom_id"] for line in lines]


def results_in(postgres_url: str) -> int:
    """How many jobs have their results, of all batches."""
    with psycopg.connect(postgres_url) as connection:
        row = connection.execute("SELECT count(*) FROM results").fetchone()
    assert row is not None
    return int(row[0])
