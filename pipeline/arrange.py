"""The last step before a batch is set going: whose results its jobs take, and which of them run first.

What runs is cut into shards again only if that changed something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from uuid import UUID

from cache.pilot import draw_pilot
from pipeline.begin import LEASE
from pipeline.cutting import ShardCutter
from pipeline.duplicates import DigestBuckets
from pipeline.equal_lines import suspects
from runtime.settings import ShardSettings
from store.again import take_results
from store.database import Database, Session
from store.followers import insert_followers
from store.open_shards import CutJob, delete_open_shards, jobs_to_run, newest_shard, open_shards
from store.submissions import Filled, NewBatch, extend_lease, insert_shards

PAGE_SHARDS = 200  # up to some 50,000 jobs in memory

NOBODY: frozenset[int] = frozenset()


def arrange(
    database: Database,
    batch: NewBatch,
    filled: Filled,
    digests: DigestBuckets,
    *,
    results_of: UUID | None,
    pilot: bool,
    bounds: ShardSettings,
) -> Filled:
    """Let jobs of a validating batch take results of `results_of`, or follow; with `pilot` a sample of it runs first.

    One transaction: whoever dies leaves a validating batch as it was before, or after.
    """
    equal = suspects(digests)
    first = next(equal, None)
    if first is None and results_of is None and not pilot:
        return filled
    taken = followers = 0
    with database.transaction() as session:
        extend_lease(session, batch, lease=LEASE)
        upto = newest_shard(session, batch.id)
        if results_of is not None:
            taken = take_results(session, results_of, batch_id=batch.id)
        if first is not None:
            followers = insert_followers(session, chain([first], equal), batch_id=batch.id)
        if not (taken or followers or pilot):
            return filled
        places = draw_pilot(filled.total - taken - followers, seed=batch.id.bytes) if pilot else NOBODY
        cut = cut_again(session, batch.id, upto=upto, pilot=places, bounds=bounds)
    options = {**filled.options, **({"pilot": len(places)} if pilot else {})}
    return replace(filled, open_shards=cut, taken=taken, followers=followers, options=options)


def cut_again(
    session: Session, batch_id: UUID, *, upto: int, bounds: ShardSettings, pilot: frozenset[int] = NOBODY
) -> int:
    """Replace the open shards up to this one by shards of what is to be run: how many.

    `pilot` are places among these jobs; shards of them come first, all other jobs keep their order.
    """
    shards = 0
    others = _pages(session, batch_id, upto, pilot, drawn=False)
    for jobs in chain(_pages(session, batch_id, upto, pilot, drawn=True), others) if pilot else others:
        cutter = ShardCutter(bounds, first=0)
        for job in jobs:
            cutter.add(job.tokens, job.size_bytes)
        spans = cutter.spans()
        insert_shards(session, spans, batch_id=batch_id, seqs=[job.seq for job in jobs])
        shards += len(spans)
    delete_open_shards(session, batch_id, upto=upto)
    return shards


def _pages(
    session: Session, batch_id: UUID, upto: int, pilot: frozenset[int], *, drawn: bool
) -> Iterator[list[CutJob]]:
    """The jobs to run that are in the pilot, or those that are not."""
    after = place = 0
    while page := open_shards(session, batch_id, after=after, upto=upto, limit=PAGE_SHARDS):
        jobs = jobs_to_run(session, batch_id, page)
        chosen = [job for at, job in enumerate(jobs, place) if (at in pilot) == drawn]
        if chosen:
            yield chosen
        after, place = page[-1].id, place + len(jobs)
