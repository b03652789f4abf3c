"""The six workloads of the end-to-end benchmark, made up from a seed: no file is needed and a run can be repeated.

A leg's file differs from every other leg's in one number at the very start of each prompt: no engine, whichever side
asks it, finds anything of an earlier leg in its prefix cache, while within a leg prefixes are shared as they would be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PATH: Final = "/v1/chat/completions"
SEED: Final = 20261125
INSTRUCTION: Final = (
    "You sort messages that customers send to a bank. Answer with the one topic that fits best and nothing else. "
    "The topics are: card arrival, card payment, cash withdrawal, exchange rate, top up, transfer, identity check, "
    "lost or stolen card, PIN, refund, fees, account settings, other."
)
SUBJECTS: Final = ("my new card", "the transfer", "a cash withdrawal", "the refund", "my top up", "a direct debit")
FAULTS: Final = ("has not arrived", "was charged twice", "is still pending", "was declined", "shows a wrong amount")
PLACES: Final = ("in Lisbon", "at the airport", "in the app", "on the website", "at a shop near my home", "abroad")
WISHES: Final = ("What should I do?", "Can you cancel it?", "How long does it take?", "Who can help me?", "Why?")
RULES: Final = (
    "Messages about {subject} that {fault} {place} are sorted by what the customer wants to know, not by their tone.",
    "If {subject} {fault} {place}, look at the date first, then at the amount, and only then at the name.",
    "Never promise anything about {subject} when it {fault} {place}; say which department answers and until when.",
)
TOPICS: Final = ("card", "cash", "transfer", "refund", "fees", "other")
# Closed on every side, so that an answer ends by itself: words of a list and no free text.
ANSWER_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "topic": {"type": "string", "enum": list(TOPICS)},
        "urgent": {"type": "boolean"},
        "department": {"type": "string", "enum": ["front office", "back office"]},
    },
    "required": ["topic", "urgent", "department"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Chats of one kind. `output_tokens` are dealt out in turn and met exactly, except with a schema."""

    name: str
    jobs: int
    output_tokens: tuple[int, ...]
    prefixes: int = 1
    prefix_rules: int = 0  # rules after the instruction in each prefix, some 25 tokens each
    schema: bool = False


# `jobs` are for a quick look: the benchmark sizes each by the machine, so that a leg takes as long as was wished.
WORKLOADS: Final = (
    Workload("8 tokens", jobs=256, output_tokens=(8,)),
    Workload("64 tokens", jobs=64, output_tokens=(64,)),
    Workload("256 tokens", jobs=32, output_tokens=(256,)),
    Workload("mixed", jobs=96, output_tokens=(8, 16, 32, 64, 128)),
    Workload("shared prefixes", jobs=128, output_tokens=(16,), prefixes=8, prefix_rules=20),
    Workload("JSON", jobs=128, output_tokens=(64,), schema=True),
)


def write_workload(path: Path, workload: Workload, *, model: str, leg: int) -> Path:
    """A leg's batch file; every engine and side reads the same bytes, but for the number of the leg."""
    with path.open("w") as opened:
        for seq, body in enumerate(bodies_of(workload, model=model, leg=leg)):
            line = {"custom_id": f"job-{seq:05d}", "method": "POST", "url": PATH, "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def bodies_of(workload: Workload, *, model: str, leg: int) -> Iterator[dict[str, Any]]:
    """The chats in the file's order: prefixes in no order, as if customers had sent them."""
    chance = random.Random(f"{SEED} {workload.name}")
    systems = [_system(chance, workload, leg=leg) for _ in range(workload.prefixes)]
    for seq in range(workload.jobs):
        body: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "max_tokens": workload.output_tokens[seq % len(workload.output_tokens)],
            "messages": [
                {"role": "system", "content": chance.choice(systems)},
                {"role": "user", "content": f"Message {seq:05d}: {_message(chance)}"},
            ],
        }
        if workload.schema:
            schema = {"name": "sorted", "schema": ANSWER_SCHEMA, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            body["ignore_eos"] = True
        yield body


def _system(chance: random.Random, workload: Workload, *, leg: int) -> str:
    rules = [
        chance.choice(RULES).format(
            subject=chance.choice(SUBJECTS), fault=chance.choice(FAULTS), place=chance.choice(PLACES)
        )
        for _ in range(workload.prefix_rules)
    ]
    return " ".join([f"{leg:06d}.", INSTRUCTION, *rules])  # the tokenizer takes digits one by one: always as many


def _message(chance: random.Random) -> str:
    subject, fault, place = chance.choice(SUBJECTS), chance.choice(FAULTS), chance.choice(PLACES)
    return f"{subject[0].upper()}{subject[1:]} {fault} {place}. {chance.choice(WISHES)}"
