"""Batches whose jobs run in another order than the file's: their shards, their pilot, their results."""

from __future__ import annotations

import json
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from cache.pilot import pilot_size
from models.lines import SubmitOptions
from models.states import CacheMode, JobOrder
from pipeline import arrange, submit
from pipeline.export import manifest, write_lines
from pipeline.submit import ORDERED, Submitted, Wishes, submit_file
from runtime.settings import LimitSettings, Settings, ShardSettings
from store.batches import batch_progress
from store.database import Database
from tests.pipeline.test_feed import fed
from tests.support.batches import dispatch_all, shards_of
from tests.support.scripted_endpoint import ScriptedEndpoint

SETTINGS = Settings.model_construct(shard=ShardSettings(max_jobs=8), limits=LimitSettings(window_s=600))
GROUPS, MEMBERS = 10, 8


def write_file(folder: Path, *, groups: int = GROUPS, members: int = MEMBERS) -> Path:
    """A chat about each of the documents, then another about each, and so on: no neighbours have anything in common."""
    folder.mkdir(exist_ok=True)
    path = folder / "lines.jsonl"
    with path.open("w") as opened:
        for number in range(groups * members):
            text = f"document {number % groups} says " + f"{number % groups} " * 400
            messages = [{"role": "system", "content": text}, {"role": "user", "content": f"question {number}"}]
            body = {"model": "m", "temperature": 0, "max_tokens": 8, "messages": messages}
            line = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            opened.write(json.dumps(line) + "\n")
    return path


def stored(database: Database, file: Path, *, order: JobOrder = JobOrder.PREFIX, cache: str = "off") -> Submitted:
    return submit_file(
        database,
        file,
        options=SubmitOptions(max_output_tokens=8, cache=CacheMode(cache)),
        settings=SETTINGS,
        served_models=None,
        reuse=False,
        wishes=Wishes(order=order),
    )


def submitted(database: Database, file: Path, *, order: JobOrder = JobOrder.PREFIX, cache: str = "off") -> UUID:
    return stored(database, file, order=order, cache=cache).batch_id


def seqs_of(database: Database, batch_id: UUID) -> list[list[int]]:
    """The jobs of every shard, in the order in which they are dispatched."""
    return [[*shard.seqs] for shard in shards_of(database, batch_id)]


def test_a_scattered_group_becomes_one_shard(database: Database, tmp_path: Path) -> None:
    shards = seqs_of(database, submitted(database, write_file(tmp_path)))

    assert [len(seqs) for seqs in shards] == [MEMBERS] * GROUPS
    assert [len({seq % GROUPS for seq in seqs}) for seqs in shards] == [1] * GROUPS
    assert sorted(seq for seqs in shards for seq in seqs) == list(range(GROUPS * MEMBERS))


def test_the_files_order_is_kept_where_it_is_asked_for(database: Database, tmp_path: Path) -> None:
    shards = seqs_of(database, submitted(database, write_file(tmp_path), order=JobOrder.FILE))

    assert [seq for seqs in shards for seq in seqs] == list(range(GROUPS * MEMBERS))


def test_whoever_submits_is_told_of_another_order(database: Database, tmp_path: Path) -> None:
    file = write_file(tmp_path)

    assert ORDERED in stored(database, file).notices
    assert ORDERED not in stored(database, file, order=JobOrder.FILE).notices
    assert ORDERED not in stored(database, write_file(tmp_path, groups=1)).notices


def test_the_manifest_says_in_which_order_jobs_were_run(database: Database, tmp_path: Path) -> None:
    file = write_file(tmp_path)
    orders = [(file, JobOrder.PREFIX), (file, JobOrder.FILE), (write_file(tmp_path / "one", groups=1), JobOrder.PREFIX)]

    batches = [submitted(database, path, order=order) for path, order in orders]
    assert [manifest_of(database, one)["input"]["order"] for one in batches] == ["prefix", "file", "file"]


def manifest_of(database: Database, batch_id: UUID) -> dict[str, Any]:
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    assert progress is not None
    return manifest(database, progress)


def test_a_long_batch_is_ordered_window_by_window(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "CHUNK_JOBS", 15)
    monkeypatch.setattr(submit, "WINDOW_JOBS", 40)

    shards = seqs_of(database, submitted(database, write_file(tmp_path)))

    seqs = [seq for seqs in shards for seq in seqs]
    first, second = seqs[:45], seqs[45:]
    assert (sorted(first), sorted(second)) == (list(range(45)), list(range(45, 80)))
    for window in (first, second):
        groups = [seq % GROUPS for seq in window]
        assert sum(one != other for one, other in pairwise(groups)) == GROUPS - 1


@pytest.mark.parametrize("page_shards", [arrange.PAGE_SHARDS, 7])
def test_the_pilot_of_the_semantic_cache_comes_first_and_the_groups_after_it(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_shards: int
) -> None:
    monkeypatch.setattr(arrange, "PAGE_SHARDS", page_shards)
    file = write_file(tmp_path, groups=50, members=20)

    batch_id = submitted(database, file, cache="semantic")

    seqs = [seq for seqs in seqs_of(database, batch_id) for seq in seqs]
    pilot = pilot_size(1000)
    groups = [seq % 50 for seq in seqs[pilot:]]
    assert sorted(seqs) == list(range(1000))
    assert sum(one != other for one, other in pairwise(groups)) < 50
    said = manifest_of(database, batch_id)["input"]
    assert (said["order"], said["pilot"]) == ("prefix", pilot)


def test_results_are_in_the_files_order(database: Database, tmp_path: Path) -> None:
    batch_id = submitted(database, write_file(tmp_path))
    dispatch_all(database)
    with ScriptedEndpoint() as endpoint:
        fed(database, endpoint.url)

    written = BytesIO()
    write_lines(database, batch_id, output=written, errors=None)

    results = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [result["custom_id"] for result in results] == [f"q-{n}" for n in range(GROUPS * MEMBERS)]
    assert [result["response"]["body"]["choices"][0]["message"]["content"] for result in results] == [
        f"echo: question {n}" for n in range(GROUPS * MEMBERS)
    ]
