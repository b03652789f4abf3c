"""What a page reads of one batch, and that it reads no more than it must."""

from __future__ import annotations

from itertools import pairwise
from uuid import UUID

import pytest
from sqlalchemy import text

from runtime.clock import uuid7
from runtime.errors import NotFound
from store import inspection
from store.database import Database, Session
from store.inspection import Wanted, course_of, engines_seen, failures_of, jobs_page, whole_job
from tests.support.batches import execute, rows

JOBS = 12_000  # more than are scanned before shards are looked at
SHARDS = 200
UNFINISHED = 40  # shards
RARE = 3  # of these are all failures


def stored(database: Database, *, jobs: int = JOBS, shards: int = SHARDS, tenant: str = "local") -> UUID:
    """A running batch by SQL: shard k has the lines k, k + 200, …; the last 60th part of the lines follow the first.

    Every 10th line of the last shards that finished is rare: truncated, empty or failed, which is HTTP 400.
    """
    batch_id, leaders, finished = uuid7(), jobs - jobs // 60, shards - UNFINISHED
    values = {"id": batch_id, "jobs": jobs, "shards": shards, "leaders": leaders, "finished": finished}
    values |= {"tenant": tenant, "rare": finished - RARE}
    with database.transaction() as session:
        for statement in (
            """INSERT INTO batches (id, tenant, state, endpoint, input_name, input_digest, submit_digest, options,
                total, followers, in_progress_at) VALUES (:id, :tenant, 'in_progress', '/v1/chat/completions', 'x', '',
                '', '{}', :jobs, :jobs - :leaders, clock_timestamp())""",
            """INSERT INTO jobs (batch_id, seq, custom_id, body)
                SELECT :id, g, 'id-' || g, '{"prompt":"' || g || '"}' FROM generate_series(0, :jobs - 1) g""",
            """INSERT INTO followers (batch_id, seq, leader)
                SELECT :id, g, g - :leaders FROM generate_series(CAST(:leaders AS int4), :jobs - 1) g""",
            'INSERT INTO engines (digest, description) VALUES (CAST(:id AS text), \'{"kind": "scripted"}\')',
            """INSERT INTO results (batch_id, seq, outcome, source, status_code, response, prompt_tokens,
                completion_tokens, cached_tokens, reasoning_tokens, duration_ms, engine_id, created_at)
                SELECT :id, g, outcome, CASE WHEN g < :leaders THEN 'engine' ELSE 'duplicate' END,
                    CASE WHEN outcome = 'failed' THEN 400 ELSE 200 END, repeat('x', 400), 3, 2, 0, 0, 10,
                    (SELECT max(id) FROM engines), now() - make_interval(secs => 600 - 600.0 * g / :jobs)
                FROM generate_series(0, :jobs - 1) g CROSS JOIN LATERAL (
                    SELECT CASE WHEN g < :leaders THEN g ELSE g - :leaders END AS leader) l CROSS JOIN LATERAL (
                    SELECT leader % :shards AS shard) s CROSS JOIN LATERAL (
                    SELECT CASE WHEN shard < :rare OR leader / :shards % 10 > 0 THEN 'succeeded'
                        ELSE (ARRAY['truncated', 'empty', 'failed'])[shard - :rare + 1] END AS outcome) o
                WHERE shard < :finished""",
            """INSERT INTO shards (batch_id, seqs, state, done, followers, failed, truncated, empty)
                SELECT :id, h.seqs, h.state, CASE WHEN h.state = 'done' THEN cardinality(h.seqs) ELSE 0 END,
                    r.followers, r.failed, r.truncated, r.empty
                FROM (SELECT CAST(g % :shards AS int4) AS shard, array_agg(g ORDER BY g) AS seqs,
                        CASE WHEN g % :shards < :finished THEN 'done' ELSE 'pending' END AS state
                    FROM generate_series(0, CAST(:leaders AS int4) - 1) g GROUP BY 1, 3) h
                LEFT JOIN (SELECT CASE WHEN seq < :leaders THEN seq ELSE seq - :leaders END % :shards AS shard,
                        count(*) FILTER (WHERE source = 'duplicate') AS followers,
                        count(*) FILTER (WHERE outcome = 'failed') AS failed,
                        count(*) FILTER (WHERE outcome = 'truncated') AS truncated,
                        count(*) FILTER (WHERE outcome = 'empty') AS empty
                    FROM results WHERE batch_id = :id GROUP BY 1) counted USING (shard)
                CROSS JOIN LATERAL (SELECT coalesce(counted.followers, 0) AS followers,
                    coalesce(counted.failed, 0) AS failed, coalesce(counted.truncated, 0) AS truncated,
                    coalesce(counted.empty, 0) AS empty) r ORDER BY h.shard""",
        ):
            session.execute(text(statement), values)
    return batch_id


def all_of(session: Session, batch_id: UUID, wanted: Wanted | None, *, limit: int) -> list[int]:
    """The seqs of all pages."""
    found: list[int] = []
    first: int | None = 0
    while first is not None:
        page = jobs_page(session, batch_id, tenant="local", first=first, limit=limit, wanted=wanted)
        assert len(page.jobs) <= limit
        assert page.next_seq is None or page.next_seq > first
        found += [job.seq for job in page.jobs]
        first = page.next_seq
    return found


def rows_read(database: Database) -> int:
    """Rows of jobs and results that were read so far."""
    [(count,)] = rows(
        database,
        "SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0) FROM pg_stat_user_tables "
        "WHERE relname LIKE 'results%' OR relname LIKE 'jobs%'",
    )
    return int(count)


def test_jobs_are_found_by_outcome_in_the_order_of_lines_wherever_they_are(database: Database) -> None:
    batch_id = stored(database)
    expected: dict[Wanted, list[int]] = {wanted: [] for wanted in Wanted}
    for seq, outcome in rows(
        database,
        """SELECT j.seq, coalesce(r.outcome, 'waiting') FROM jobs j LEFT JOIN results r USING (batch_id, seq)
        WHERE batch_id = :id ORDER BY seq""",
        id=batch_id,
    ):
        expected[Wanted(outcome)].append(seq)
    assert all(expected.values())
    with database.transaction() as session:
        assert all_of(session, batch_id, None, limit=200) == list(range(JOBS))
        for wanted, seqs in expected.items():
            assert all_of(session, batch_id, wanted, limit=5 if len(seqs) < 50 else 200) == seqs, wanted
        [last] = jobs_page(session, batch_id, tenant="local", first=JOBS - 1, limit=5).jobs
        assert (last.custom_id, last.outcome, last.source) == (f"id-{JOBS - 1}", None, None)
        page = jobs_page(session, batch_id, tenant="local", first=0, limit=1, wanted=Wanted.FAILED)
        assert [(job.status_code, job.prompt_tokens, job.duration_ms) for job in page.jobs] == [(400, 3, 10)]


def test_failures_are_counted_by_kind_with_their_followers_and_an_example(database: Database) -> None:
    batch_id = stored(database)
    [(failed,)] = rows(database, "SELECT sum(failed) FROM shards")
    execute(
        database,
        """UPDATE results SET error_code = 'timeout', error_message = 'too late', status_code = NULL, response = NULL
        WHERE outcome = 'failed' AND seq IN (
            SELECT seq FROM results WHERE outcome = 'failed' AND source = 'engine' ORDER BY seq LIMIT 2 OFFSET 2)""",
    )
    with database.transaction() as session:
        found = failures_of(session, batch_id, tenant="local")
        assert found.complete
        assert [(kind.code, kind.count, kind.message) for kind in found.kinds] == [
            ("http_400", failed - 2, None),
            ("timeout", 2, "too late"),
        ]
        assert found.kinds[0].response == "x" * 400
        course = course_of(session, batch_id, tenant="local")
        assert engines_seen(session, batch_id, tenant="local") == [{"kind": "scripted"}]
    [(ended,)] = rows(database, "SELECT count(*) FROM results")
    assert (len(course), sum(bucket.jobs for bucket in course)) == (inspection.BUCKETS, ended)
    assert sum(bucket.failed for bucket in course) == failed
    steps = [after.at - before.at for before, after in pairwise(course)]
    assert max(steps) - min(steps) < 0.001


def test_a_search_for_rare_jobs_reads_neither_jobs_nor_results_of_other_shards(
    database: Database, postgres_url: str
) -> None:
    batch_id = stored(database, jobs=30_000)
    execute(database, "ANALYZE")
    for number in range(12):  # the driver prepares a statement after 5, the server fixes its plan after 5 more
        with database.transaction() as session:
            jobs_page(session, batch_id, tenant="local", first=number, limit=200, wanted=Wanted.EMPTY)
            failures_of(session, batch_id, tenant="local")
            engines_seen(session, batch_id, tenant="local")
    other = Database(postgres_url)  # its statistics are reported when its connections close
    before = rows_read(other)
    with other.transaction() as session:
        jobs_page(session, batch_id, tenant="local", first=0, limit=200, wanted=Wanted.EMPTY)
        failures_of(session, batch_id, tenant="local")
        engines_seen(session, batch_id, tenant="local")
        session.execute(text("SELECT pg_stat_force_next_flush()"))
    read = rows_read(other) - before
    other.close()
    assert inspection.SCANNED_JOBS / 2 < read < inspection.SCANNED_JOBS + 4 * 150 + SHARDS + 400, read


@pytest.mark.parametrize("state", ["other", "deleted", "validating"])
def test_a_batch_that_is_not_the_tenants_or_not_whole_shows_nothing(database: Database, state: str) -> None:
    batch_id = stored(database, jobs=600)
    tenant = "other" if state == "other" else "local"
    if state == "deleted":
        execute(database, "UPDATE batches SET deleted_at = clock_timestamp()")
    if state == "validating":
        execute(database, "UPDATE batches SET state = 'validating'")
    with database.transaction() as session:
        if state == "validating":
            assert jobs_page(session, batch_id, tenant=tenant, first=0, limit=9).jobs == []
        else:
            for read in (failures_of, course_of, engines_seen):
                with pytest.raises(NotFound):
                    read(session, batch_id, tenant=tenant)
            with pytest.raises(NotFound):
                jobs_page(session, batch_id, tenant=tenant, first=0, limit=9)
        with pytest.raises(NotFound):
            whole_job(session, batch_id, 0, tenant=tenant)
