"""Finding the job that kills its engine: suspects run with nothing else on it, halved until one is alone.

Binary group testing (Dorfman 1943; here by repeated halving): among n suspects one killer is found with at most
log2(n) + DEATHS_ALONE - 1 deaths. It must not touch Postgres: its owner holds the shard and writes the outcomes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from models.jobs import Job

DEATHS_TO_QUARANTINE = 2  # of engines under a job; the first may be anybody's
DEATHS_ALONE = 3  # an engine killed from outside at just this moment, three times in a row, is no accident


async def isolate(
    suspects: Sequence[Job],
    *,
    survives: Callable[[Job], Awaitable[bool]],
    engine_is_up: Callable[[], Awaitable[bool]],
    convict: Callable[[Job, int], None],
) -> None:
    """Run every suspect until it has an outcome or is convicted.

    `survives` runs one job and records its outcome; False: the engine died meanwhile. `engine_is_up` waits for the
    engine; False: this attempt must end, and what is left stays unfinished. `convict` ends a job with the number of
    engines that died while it was alone.
    """
    groups = [list(suspects)]
    while groups:
        group = groups.pop()
        if not group:
            continue
        deaths = 0
        left = group
        while left == group:
            if not await engine_is_up():
                return
            ends = await asyncio.gather(*(survives(job) for job in group))
            left = [job for job, survived in zip(group, ends, strict=True) if not survived]
            if len(group) > 1:
                break
            deaths += len(left)
            if deaths == DEATHS_ALONE:
                convict(group[0], deaths)
                left = []
        middle = (len(left) + 1) // 2
        groups += [left[middle:], left[:middle]]
