"""Chat bodies as a shop's would be, all different, and the batch files made of them.

Those of `bodies` have about 400 bytes, which an order of jobs does not look into; those of `documents` about 1,000.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

ENDPOINT = "/v1/chat/completions"
SYSTEM = (
    "You sort the messages of a shop for camping gear. Answer with the name of one queue: billing, shipping, "
    "returns, account, product, safety or other.\nDo not answer the customer."
)
TEXT = (
    'please parcel order invoice tent stove the my was not late broken when "refund" address café return pole it and '
    "sleeping bag account password photo I on Friday to of received 40817 wrong size thanks twice charged"
)


def bodies(count: int, *, model: str) -> Iterator[str]:
    """The same bodies in every run; the number in each makes it differ from all others."""
    chance = random.Random(1)
    for seq in range(count):
        question = " ".join(chance.choices(TEXT.split(), k=chance.randint(8, 30)))
        yield json.dumps(
            {
                "model": model,
                "messages": [
                    {"role": "system", "content": SYSTEM[: chance.randint(60, len(SYSTEM))]},
                    {"role": "user", "content": f"{seq}: {question}"},
                ],
                "max_tokens": chance.choice([8, 16, 64]),
                "temperature": 0,
            },
            ensure_ascii=False,
        )


def documents(count: int, *, model: str, about: int) -> Iterator[str]:
    """Chats about so many documents in turn, so that no two neighbours begin alike."""
    chance = random.Random(2)
    texts = [f"Ticket {number}: {' '.join(chance.choices(TEXT.split(), k=120))}" for number in range(about)]
    for seq in range(count):
        messages = [
            {"role": "system", "content": texts[seq % about]},
            {"role": "user", "content": f"{seq}: {' '.join(chance.choices(TEXT.split(), k=8))}"},
        ]
        body = {"model": model, "messages": messages, "max_tokens": chance.choice([8, 16, 64]), "temperature": 0}
        yield json.dumps(body, ensure_ascii=False)


def custom_id(seq: int) -> str:
    """The name of a line."""
    return f"ticket-{seq:08}"


def line(seq: int, body: str) -> str:
    """One line of a batch file, newline included."""
    return f'{{"custom_id": "{custom_id(seq)}", "method": "POST", "url": "{ENDPOINT}", "body": {body}}}\n'


def write_batch(path: Path, count: int, *, model: str) -> Path:
    """A batch file of so many lines."""
    return write_lines(path, bodies(count, model=model))


def write_lines(path: Path, found: Iterable[str]) -> Path:
    """A batch file with these bodies."""
    with path.open("w") as opened:
        opened.writelines(line(seq, body) for seq, body in enumerate(found))
    return path
