"""A LangChain Runnable whose batch() is one Stoker batch: python examples/langchain_batch.py

It needs `pip install langchain-core`. In a chain each step gets the whole list, so `prompt | Stoker()` over a
thousand inputs is one batch of a thousand rows.
"""

from __future__ import annotations

from typing import Any

import stoker_client
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig


class Stoker(Runnable[PromptValue | str, str]):
    """Texts in, answers out; `options` are those of stoker_client.run."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def invoke(self, input: PromptValue | str, config: RunnableConfig | None = None, **kwargs: Any) -> str:
        """A batch of one: for trying a chain."""
        return str(self.batch([input], config)[0])

    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """All inputs as one batch; a row without a good answer is a RuntimeError, raised or in its place."""
        texts = [one if isinstance(one, str) else one.to_string() for one in inputs]
        answers = stoker_client.run(texts, **self.options)
        found = [one.text if one.error is None else RuntimeError(f"input {one.row}: {one.error}") for one in answers]
        first = next((one for one in found if isinstance(one, RuntimeError)), None)
        if first is not None and not return_exceptions:
            raise first
        return found


if __name__ == "__main__":
    chain = PromptTemplate.from_template("Say in other words: {text}") | Stoker(max_output_tokens=32)
    print(chain.batch([{"text": "Good morning"}, {"text": "Good night"}], return_exceptions=True))
