"""Equal lines of a batch run once: the others follow, and end in the very write that ends their leader."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from models.jobs import JobResult, Usage, failed
from models.lines import SubmitOptions
from models.states import CacheMode, Outcome
from pipeline import equal_lines
from pipeline.again import retry_batch
from pipeline.dispatch import Dispatcher
from pipeline.duplicates import LOW_BITS, DigestBuckets
from pipeline.equal_lines import suspects
from pipeline.export import write_lines
from pipeline.submit import Submitted, Wishes, submit_file
from runtime.settings import CacheSettings, LimitSettings, Settings, ShardSettings
from store.batches import BatchProgress, batch_progress, batches_to_finish, finish, mark_expired, request_cancel
from store.database import Database
from store.followers import insert_followers
from store.results import dead_jobs
from store.shards import Claim, close, give_back, load_jobs, write_results
from store.submissions import delete_validating
from tests.support.batches import (
    CHAT,
    LEASE_S,
    answers,
    batch_row,
    chat,
    claimed,
    dispatch_all,
    execute,
    results_of,
    shards_of,
)
from tests.support.silent_broker import quiet_leader

SETTINGS = Settings.model_construct(shard=ShardSettings(max_jobs=4), limits=LimitSettings(window_s=600))
A, B, C = (chat(word, temperature=0) for word in "abc")
Rows = list[tuple[Any, ...]]


@pytest.fixture
def dispatcher(database: Database, redis_url: str) -> Iterator[Dispatcher]:
    with quiet_leader(database, redis_url) as leading:
        yield leading


def submit(
    database: Database,
    folder: Path,
    bodies: Sequence[dict[str, Any]],
    *,
    stoker: dict[int, dict[str, Any]] | None = None,
    cache: CacheMode = CacheMode.EXACT,
    settings: Settings = SETTINGS,
    of: UUID | None = None,
    first: int = 0,
    url: str = CHAT,
) -> Submitted:
    file = folder / f"{uuid4().hex}.jsonl"
    with file.open("w") as lines:
        for seq, body in enumerate(bodies):
            line = {"custom_id": f"id-{first + seq}", "method": "POST", "url": url, "body": body}
            own = (stoker or {}).get(seq)
            lines.write(json.dumps(line if own is None else line | {"stoker": own}) + "\n")
    return submit_file(
        database,
        file,
        options=SubmitOptions(max_output_tokens=64, cache=cache),
        settings=settings,
        served_models=None,
        reuse=False,
        wishes=Wishes(results_of=of),
    )


def rows(database: Database, statement: str, **values: Any) -> Rows:
    with database.transaction() as session:
        return [tuple(row) for row in session.execute(text(statement), values)]


def followers_of(database: Database, batch_id: UUID) -> Rows:
    return rows(database, "SELECT leader, seq FROM followers WHERE batch_id = :id ORDER BY seq", id=batch_id)


def sources_of(database: Database, batch_id: UUID) -> list[str]:
    return [
        row[0] for row in rows(database, "SELECT source FROM results WHERE batch_id = :id ORDER BY seq", id=batch_id)
    ]


def progress_of(database: Database, batch_id: UUID) -> BatchProgress:
    with database.transaction() as session:
        return batch_progress(session, batch_id, tenant="local")


def write(database: Database, taken: Claim, results: Sequence[JobResult]) -> int | None:
    with database.transaction() as session:
        return write_results(session, taken, results, engine_id=None, lease_s=LEASE_S)


def run_all(database: Database, *, failing: frozenset[int] = frozenset()) -> None:
    """Answer and close every shard that waits, and end the batches."""
    for shard_id in dispatch_all(database):
        taken = claimed(database, shard_id)
        with database.transaction() as session:
            seqs = [job.seq for job in load_jobs(session, taken).jobs]
            bad = [failed(seq, code="timeout", message="late") for seq in seqs if seq in failing]
            good = answers(seq for seq in seqs if seq not in failing)
            write_results(session, taken, [*good, *bad], engine_id=None, lease_s=LEASE_S)
            assert close(session, taken)
    with database.transaction() as session:
        for batch_id in batches_to_finish(session):
            assert finish(session, batch_id) == 0


def test_equal_lines_run_once_and_each_has_the_answer_in_its_place(database: Database, tmp_path: Path) -> None:
    submitted = submit(database, tmp_path, [A, B, A, C, B, A])
    assert (submitted.total, submitted.followers) == (6, 3)
    assert followers_of(database, submitted.batch_id) == [(0, 2), (1, 4), (0, 5)]
    assert [shard.seqs for shard in shards_of(database, submitted.batch_id)] == [(0, 1, 3)]
    run_all(database)
    results = results_of(database, submitted.batch_id)
    assert [result.response for result in results] == [f'{{"answer":{seq}}}' for seq in (0, 1, 0, 3, 1, 0)]
    assert sources_of(database, submitted.batch_id) == ["engine", "engine", "duplicate", "engine", *["duplicate"] * 2]
    progress = progress_of(database, submitted.batch_id)
    assert (progress.state, progress.done, progress.succeeded, progress.followers) == ("completed", 6, 6, 3)
    assert (progress.prompt_tokens, progress.completion_tokens) == (9, 6)
    assert (progress.served, progress.saved_tokens) == (3, 15)


def test_a_followers_line_names_its_leader(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, B, A]).batch_id
    run_all(database)
    output = io.BytesIO()
    write_lines(database, batch_id, output=output, errors=None)
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [line["custom_id"] for line in lines] == ["id-0", "id-1", "id-2"]
    assert lines[2]["stoker"] == {"outcome": "succeeded", "source": "duplicate", "leader": "id-0"}
    assert lines[2]["response"]["body"] == lines[0]["response"]["body"]


@pytest.mark.parametrize(
    ("second", "own"),
    [
        (chat("a"), None),
        (chat("a", temperature=0.5), None),
        (chat("a", temperature=0, n=2), None),
        (chat("a", temperature=0, tools=[{"type": "function"}]), None),
        (A, {"cache": "off"}),
    ],
)
def test_lines_that_may_answer_differently_all_run(
    database: Database, tmp_path: Path, second: dict[str, Any], own: dict[str, Any] | None
) -> None:
    stoker = {1: own, 2: own} if own else {}
    assert submit(database, tmp_path, [A, second, second], stoker=stoker).followers == 0


def test_what_may_be_served_by_a_similar_request_does_not_lead_a_line_that_may_not(
    database: Database, tmp_path: Path
) -> None:
    submitted = submit(database, tmp_path, [A, A, A, A], stoker={seq: {"cache": "semantic"} for seq in (0, 3)})
    assert followers_of(database, submitted.batch_id) == [(1, 2), (0, 3)]


def test_with_the_cache_off_every_line_runs_and_with_sampled_those_that_sample_share(
    database: Database, tmp_path: Path
) -> None:
    assert submit(database, tmp_path, [A, A], cache=CacheMode.OFF).followers == 0
    sampled = SETTINGS.model_copy(update={"cache": CacheSettings(sampled=True)})
    assert (
        submit(database, tmp_path, [chat("a"), chat("a"), chat("a", n=2), chat("a", n=2)], settings=sampled).followers
        == 1
    )


def test_equal_embeddings_run_once(database: Database, tmp_path: Path) -> None:
    body = {"model": "m", "input": "text"}
    assert submit(database, tmp_path, [body, body], url="/v1/embeddings").followers == 1


def test_a_failed_leader_fails_its_followers_and_a_retry_runs_it_once_again(database: Database, tmp_path: Path) -> None:
    first = submit(database, tmp_path, [B, A, C, A, B, A], stoker={1: {"sources": ["s"]}}).batch_id
    run_all(database, failing=frozenset({1}))
    results = results_of(database, first)
    assert [result.error_code for result in results] == [None, "timeout", None, "timeout", None, "timeout"]
    progress = progress_of(database, first)
    assert (progress.done, progress.failed, progress.succeeded, progress.served) == (6, 3, 3, 1)
    again = retry_batch(database, first, settings=SETTINGS, reuse=False)
    assert (again.total, again.followers) == (3, 2)
    assert followers_of(database, again.batch_id) == [(0, 1), (0, 2)]
    assert [shard.seqs for shard in shards_of(database, again.batch_id)] == [(0,)]
    assert rows(database, "SELECT stoker FROM jobs WHERE batch_id = :id ORDER BY seq", id=again.batch_id) == [
        ('{"sources":["s"]}',),
        (None,),
        (None,),
    ]
    run_all(database)
    assert progress_of(database, again.batch_id).succeeded == 3


def test_truncated_and_empty_answers_count_for_their_followers_too(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, A, B, B, B]).batch_id
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    write(database, taken, [*answers([0], outcome=Outcome.TRUNCATED), *answers([2], outcome=Outcome.EMPTY)])
    progress = progress_of(database, batch_id)
    assert (progress.truncated, progress.empty, progress.done, progress.succeeded) == (2, 3, 5, 0)


def test_a_write_repeated_or_late_gives_no_follower_a_second_result(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, B, A, B]).batch_id
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    assert write(database, taken, answers([0])) == 1
    before = results_of(database, batch_id)
    assert write(database, taken, answers([0])) == 1, "as after an ambiguous COMMIT"
    assert results_of(database, batch_id) == before
    with database.transaction() as session:
        assert give_back(session, taken, wait_s=0)
    assert write(database, taken, answers([1])) is None, "the fence is lost"
    assert results_of(database, batch_id) == before
    assert [result.seq for result in before] == [0, 2]
    run_all(database)
    progress = progress_of(database, batch_id)
    assert (progress.done, progress.succeeded, len(results_of(database, batch_id))) == (4, 4, 4)


def test_a_leader_that_dies_before_its_commit_leaves_neither_row(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, A]).batch_id
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    with pytest.raises(KeyboardInterrupt), database.transaction() as session:
        write_results(session, taken, answers([0]), engine_id=None, lease_s=LEASE_S)
        raise KeyboardInterrupt
    assert results_of(database, batch_id) == []


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_a_batch_that_is_ended_early_ends_its_followers(
    database: Database, tmp_path: Path, dispatcher: Dispatcher, ending: str
) -> None:
    batch_id = submit(database, tmp_path, [A, B, A, C, B, C]).batch_id
    [shard_id] = dispatch_all(database)
    taken = claimed(database, shard_id)
    write(database, taken, answers([0]))
    with database.transaction() as session:
        assert give_back(session, taken, wait_s=0)
        if ending == "cancelled":
            assert request_cancel(session, batch_id)
        else:
            session.execute(text("UPDATE batches SET expires_at = created_at"))
            assert mark_expired(session) == [batch_id]
    dispatcher.sweep()
    dispatcher.finish_batches()
    codes = [result.error_code for result in results_of(database, batch_id)]
    assert codes == [None, f"batch_{ending}", None, *[f"batch_{ending}"] * 3]
    progress = progress_of(database, batch_id)
    assert (progress.state, progress.done, progress.failed, progress.succeeded) == (ending, 6, 4, 2)


def test_a_follower_of_a_poison_job_ends_with_it(database: Database, tmp_path: Path, dispatcher: Dispatcher) -> None:
    batch_id = submit(database, tmp_path, [A, A]).batch_id
    for _ in range(6):
        execute(database, "UPDATE shards SET not_before = NULL, state = 'dispatched' WHERE state = 'pending'")
        [(shard_id,)] = rows(database, "SELECT id FROM shards WHERE state = 'dispatched'")
        claimed(database, shard_id)
        execute(database, "UPDATE shards SET lease_until = '2000-01-01'")
        dispatcher.sweep()
    assert [result.error_code for result in results_of(database, batch_id)] == ["poison_job"] * 2
    with database.transaction() as session:
        dead = dead_jobs(session, tenant="local", batch_id=batch_id, limit=20)
    assert [job.custom_id for job in dead] == ["id-0", "id-1"]


def test_a_follower_without_a_result_becomes_a_job(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, B, A, B, A]).batch_id
    run_all(database)
    execute(database, "UPDATE batches SET state = 'finalizing', ending = NULL, ended_at = NULL")
    execute(database, "DELETE FROM results WHERE seq IN (1, 2, 3)")
    with database.transaction() as session:
        assert finish(session, batch_id) == 2
    assert followers_of(database, batch_id) == [(1, 3), (0, 4)], "3 is brought by its leader, which is missing too"
    assert progress_of(database, batch_id).done == 2
    run_all(database)
    progress = progress_of(database, batch_id)
    assert (progress.state, progress.done, progress.succeeded, progress.followers) == ("completed", 5, 5, 2)
    assert len(results_of(database, batch_id)) == 5


def test_equal_digests_of_different_bodies_do_not_follow(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, B, C]).batch_id
    with database.transaction() as session:
        assert insert_followers(session, [(0, 0), (0, 1), (0, 2)], batch_id=batch_id) == 0


def test_shards_are_cut_of_the_leaders_with_the_tokens_that_they_had(database: Database, tmp_path: Path) -> None:
    plain = [chat(f"question {number:03}", temperature=0) for number in range(40)]
    mixed = [body for pair in zip(plain, [plain[0]] * 40, strict=True) for body in pair]
    cuts = [
        rows(database, "SELECT cardinality(seqs), tokens FROM shards WHERE batch_id = :id ORDER BY id", id=batch_id)
        for batch_id in (submit(database, tmp_path, bodies).batch_id for bodies in (plain, mixed))
    ]
    assert cuts[0] == cuts[1]
    assert batch_row(database, submit(database, tmp_path, mixed).batch_id)["shards_left"] == len(cuts[0]) == 10


def test_reused_results_come_first_and_what_is_left_follows(database: Database, tmp_path: Path) -> None:
    first = submit(database, tmp_path, [A, B]).batch_id
    run_all(database)
    again = submit(database, tmp_path, [A, B, A, C, A], of=first, stoker={1: {"cache": "off"}})
    assert (again.taken, again.followers) == (1, 1), "a line with its own cache off takes no earlier result"
    assert followers_of(database, again.batch_id) == [(2, 4)]
    assert [shard.seqs for shard in shards_of(database, again.batch_id) if shard.state != "done"] == [(1, 2, 3)]
    run_all(database)
    assert sources_of(database, again.batch_id) == ["reused", "engine", "engine", "engine", "duplicate"]
    assert progress_of(database, again.batch_id).done == 5


def test_what_served_a_leader_is_what_its_followers_saved(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, A, A]).batch_id
    execute(
        database,
        """INSERT INTO cache_entries (tenant, key, response, status_code, prompt_tokens, completion_tokens, batch_id,
        seq, expires_at) VALUES ('local', 'k', '{}', 200, 30, 10, :id, 0, clock_timestamp() + interval '1 day')""",
        id=batch_id,
    )
    [(entry,)] = rows(database, "SELECT id FROM cache_entries")
    [shard_id] = dispatch_all(database)
    served = JobResult(seq=0, outcome=Outcome.SUCCEEDED, response="{}", status_code=200, usage=Usage(), entry=entry)
    write(database, claimed(database, shard_id), [served])
    progress = progress_of(database, batch_id)
    assert (progress.served, progress.saved_tokens) == (3, 120)
    assert rows(database, "SELECT DISTINCT cache_entry_id FROM results") == [(entry,)]


def test_followers_of_a_batch_that_was_never_set_going_are_deleted(database: Database, tmp_path: Path) -> None:
    batch_id = submit(database, tmp_path, [A, A]).batch_id
    execute(database, "UPDATE batches SET state = 'validating'")
    with database.transaction() as session:
        assert delete_validating(session, batch_id)
    assert followers_of(database, batch_id) == []


@given(st.lists(st.integers(-4, 4), max_size=60), st.integers(1, 20), st.integers(1, 5))
def test_every_repeated_digest_is_led_by_its_first_line(digests: list[int], spill_at: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch, DigestBuckets("qi", spill_at=spill_at) as buckets:
        patch.setattr(equal_lines, "MOST_FOLLOWERS", most)
        keep_digest, keep_seq = buckets.appends
        for seq, digest in enumerate(digests):
            keep_digest[digest & LOW_BITS](digest)
            keep_seq[digest & LOW_BITS](seq)
            buckets.settle()
        found = dict((seq, leader) for leader, seq in suspects(buckets))
    assert found.keys() == {seq for seq, digest in enumerate(digests) if digests.count(digest) > 1}
    for seq, leader in found.items():
        same = [at for at, digest in enumerate(digests) if digest == digests[seq]]
        assert leader == same[same.index(seq) // (most + 1) * (most + 1)]
    assert all(count <= most + 1 for count in Counter(found.values()).values())
