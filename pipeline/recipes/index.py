"""Index: the document is in its collection, to be searched; the engine is not asked."""

from __future__ import annotations

import msgspec

from models.jobs import JobResult
from models.states import Outcome, Source
from pipeline.recipe import NoOptions, Recipe, Task


async def _run(task: Task) -> JobResult:
    found = {"object": "stoker.document", "source": task.document.source, "passages": task.document.passages}
    return JobResult(
        task.seq,
        Outcome.SUCCEEDED,
        source=Source.NONE,
        status_code=200,
        response=msgspec.json.encode(found).decode(),
    )


RECIPE = Recipe(
    "index",
    "put documents into a collection, to be searched",
    NoOptions,
    _run,
    instruction="(the engine is not asked)",
    max_tokens=1,
    needs_passages=True,
)
