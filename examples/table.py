"""A table, a prompt, a table: python examples/table.py

It runs on the gateway of STOKER_URL and STOKER_API_KEY, or starts one on this machine for as long as it runs.
"""

from __future__ import annotations

import pandas
import stoker_client

messages = pandas.DataFrame(
    {"text": ["The app crashes when I log in", "Love the new colours", "Can I pay by invoice?"]}
)
answered = stoker_client.run(
    messages,
    prompt="What is this message? {text}",
    labels=["bug", "praise", "question"],
    max_output_tokens=32,
)
print(answered[["text", "answer", "error"]].to_string(index=False))
