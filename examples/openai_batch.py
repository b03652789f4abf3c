"""The official client against a gateway of `make up`, from upload to results: python examples/openai_batch.py

It needs `pip install openai`, and the key that `make up` wrote into a file, which it names:
OPENAI_API_KEY=$(cat /var/lib/stoker/key) python examples/openai_batch.py
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from openai import OpenAI

PROMPTS = Path(__file__).with_name("prompts.jsonl")
ENDED = {"completed", "failed", "expired", "cancelled"}


def main() -> None:
    """Upload the examples, run them as a batch, print what came."""
    if "OPENAI_API_KEY" not in os.environ:
        sys.exit("set OPENAI_API_KEY to the key that `make up` wrote into the file it names")
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1"), api_key=os.environ.get("OPENAI_API_KEY")
    )
    with PROMPTS.open("rb") as prompts:
        file = client.files.create(file=prompts, purpose="batch")
    print(f"uploaded {file.filename}: {file.id}, {file.bytes:,} bytes")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"from": "examples"},
        extra_body={"stoker": {"cache": "off", "budget_tokens": 100_000, "labels": {"team": "examples"}}},
    )
    print(f"created {batch.id}: {batch.status}")
    seen = ""
    while batch.status not in ENDED:
        time.sleep(1.0)
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        now = f"{batch.status} {counts.completed + counts.failed}/{counts.total}" if counts else batch.status
        if now != seen:
            print(now)
            seen = now
    if batch.errors is not None:
        for problem in batch.errors.data or []:
            print(f"line {problem.line}: {problem.message} [{problem.code}]")
        sys.exit(1)
    if batch.output_file_id is not None:
        for text in list(client.files.content(batch.output_file_id).iter_lines())[:3]:
            line = json.loads(text)
            print(f"{line['custom_id']}: {line['response']['body']['choices'][0]['message']['content'][:60]!r}")
    print(f"usage: {batch.usage.total_tokens if batch.usage else 0:,} tokens; error file: {batch.error_file_id}")
    print(f"newest batches: {[one.id[:18] for one in client.batches.list(limit=2).data]}")


if __name__ == "__main__":
    main()
