"""Chapter 4: the last shard ends the batch, and its results are read in the order of the file."""

from __future__ import annotations

import io
import json
from pathlib import Path

from models.states import BatchState
from pipeline.export import write_lines
from store.batches import batch_progress, batches_to_finish, finish
from store.database import Database
from store.shards import close, write_results
from tests.support.batches import answers, chats, claimed, dispatch_all, store_batch


def test_the_batch_ends_with_its_last_shard_and_its_results_stand_in_input_order(
    database: Database, tmp_path: Path
) -> None:
    batch_id = store_batch(database, tmp_path, chats(4), shard_jobs=2)
    last_first = sorted(dispatch_all(database), reverse=True)

    for shard_id in last_first:
        shard = claimed(database, shard_id)
        with database.transaction() as session:
            write_results(session, shard, answers(reversed(shard.seqs)), engine_id=None, lease_s=30)
            close(session, shard)

    with database.transaction() as session:
        assert batches_to_finish(session) == {batch_id: 4}
        assert finish(session, batch_id) == 0, "no job is missing its result"
        progress = batch_progress(session, batch_id, tenant="local")
    assert progress.state is BatchState.COMPLETED
    assert (progress.done, progress.prompt_tokens, progress.completion_tokens) == (4, 12, 8)

    output = io.BytesIO()
    assert write_lines(database, batch_id, output=output, errors=None) == (4, 0)
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [line["custom_id"] for line in lines] == ["id-0", "id-1", "id-2", "id-3"]
    assert lines[2]["response"]["body"] == {"answer": 2}
