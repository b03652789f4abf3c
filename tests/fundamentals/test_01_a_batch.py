"""Chapter 1: a file becomes a batch. Read these chapters in order; each is what the system does, by hand."""

from __future__ import annotations

import json
from pathlib import Path

from models.lines import SubmitOptions
from models.states import BatchState
from pipeline.submit import submit_file
from runtime.settings import Settings, ShardSettings
from store.batches import batch_progress
from store.database import Database
from tests.support.batches import shards_of

OPTIONS = SubmitOptions(max_output_tokens=64)
SETTINGS = Settings.model_construct(shard=ShardSettings(max_jobs=4))


def test_every_line_of_a_file_is_a_job_and_a_few_jobs_are_a_shard(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": f"q{number}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {"model": "any", "messages": [{"role": "user", "content": f"{number} + 1?"}]},
                }
            )
            + "\n"
            for number in range(10)
        )
    )

    submitted = submit_file(database, file, options=OPTIONS, settings=SETTINGS, served_models=None, reuse=False)

    assert submitted.total == 10
    shards = shards_of(database, submitted.batch_id)
    assert [shard.seqs for shard in shards] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert {shard.state for shard in shards} == {"pending"}


def test_the_batch_is_in_progress_from_the_moment_that_submit_returns(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text(
        '{"custom_id": "q", "method": "POST", "url": "/v1/embeddings", "body": {"model": "any", "input": "hello"}}\n'
    )

    batch_id = submit_file(database, file, options=OPTIONS, settings=SETTINGS, served_models=None, reuse=False).batch_id

    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    assert progress.state is BatchState.IN_PROGRESS
    assert (progress.total, progress.done) == (1, 0)
