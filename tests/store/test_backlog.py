"""The view `backlog`: what an autoscaler counts, and the role that may read it and nothing else."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import yaml
from psycopg import sql
from sqlalchemy import make_url

from store.batches import request_cancel, resume
from store.database import Database, libpq_url
from store.documents import claim_document, postpone_document
from store.shards import close, give_back, write_results
from tests.support.backups import tools_for
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, execute, rows, store_batch
from tests.support.cooking import add
from tests.support.processes import REPOSITORY

KEDA = REPOSITORY / "deploy" / "kubernetes" / "keda"
ROLE_SQL = (KEDA / "backlog-role.sql").read_text()
HOUR_S = 3600.0


def backlog(database: Database, node: str = "generation") -> tuple[int, float]:
    ((jobs, oldest_s),) = rows(database, "SELECT jobs, oldest_s FROM backlog WHERE node = :node", node=node)
    return jobs, oldest_s


def test_without_batches_and_documents_there_is_nothing(database: Database) -> None:
    assert rows(database, "SELECT node, jobs, oldest_s FROM backlog ORDER BY node") == [
        ("documents", 0, 0.0),
        ("generation", 0, 0.0),
    ]


def test_jobs_without_a_result_count_from_submit_to_their_last(database: Database, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(5), shard_jobs=3)
    assert backlog(database)[0] == 5
    first, second = dispatch_all(database)
    assert backlog(database)[0] == 5
    claim = claimed(database, first)
    with database.transaction() as session:
        write_results(session, claim, answers(claim.seqs[:2]), engine_id=None, lease_s=LEASE_S)

    assert backlog(database)[0] == 3  # those that a worker has count, or it would be taken away under them

    for one in (claim, claimed(database, second)):
        with database.transaction() as session:
            write_results(session, one, answers(one.seqs), engine_id=None, lease_s=LEASE_S)
            assert close(session, one)
    assert backlog(database) == (0, 0.0)


def test_the_oldest_is_the_oldest_batch_that_no_worker_has_wholly(database: Database, tmp_path: Path) -> None:
    old = store_batch(database, tmp_path, chats(1))
    store_batch(database, tmp_path, chats(1))
    execute(database, "UPDATE batches SET in_progress_at = in_progress_at - interval '1 hour' WHERE id = :id", id=old)
    assert HOUR_S <= backlog(database)[1] < HOUR_S + 60

    for shard in dispatch_all(database):
        if rows(database, "SELECT batch_id FROM shards WHERE id = :id", id=shard) == [(old,)]:
            claimed(database, shard)

    jobs, oldest_s = backlog(database)
    assert jobs == 2
    assert oldest_s < 60


def test_what_no_worker_could_run_now_does_not_count(database: Database, tmp_path: Path) -> None:
    batch = store_batch(database, tmp_path, chats(4))
    (shard,) = dispatch_all(database)
    claim = claimed(database, shard)
    with database.transaction() as session:
        assert give_back(session, claim, wait_s=HOUR_S)
    assert backlog(database) == (0, 0.0)
    execute(database, "UPDATE shards SET not_before = clock_timestamp() - interval '1 s'")
    assert backlog(database)[0] == 4

    execute(database, "UPDATE batches SET paused_reason = 'too many fail'")
    assert backlog(database) == (0, 0.0)
    with database.transaction() as session:
        assert resume(session, batch)
    assert backlog(database)[0] == 4

    with database.transaction() as session:
        assert request_cancel(session, batch)
    assert backlog(database) == (0, 0.0)


def test_documents_count_until_they_are_read(database: Database) -> None:
    for number in range(3):
        add(database, f"text {number}", name=f"{number}.txt")
    execute(database, "UPDATE documents SET created_at = created_at - interval '1 hour'")
    assert backlog(database, "documents")[0] == 3
    assert backlog(database, "documents")[1] >= HOUR_S
    with database.transaction() as session:
        claim = claim_document(session, lease_s=LEASE_S)
    assert claim is not None
    assert backlog(database, "documents")[0] == 3

    with database.transaction() as session:
        assert postpone_document(session, claim, wait_s=HOUR_S, counted=False)

    assert backlog(database, "documents")[0] == 2
    assert backlog(database)[0] == 0


def test_what_a_budget_keeps_from_being_sent_does_not_count(database: Database, tmp_path: Path) -> None:
    batch = store_batch(database, tmp_path, chats(4), shard_jobs=2)
    claim = claimed(database, dispatch_all(database)[0])
    execute(database, "UPDATE shards SET state = 'pending' WHERE state = 'dispatched'")
    execute(
        database,
        "INSERT INTO budgets (batch_id, period, began_at, cap, waits_until) "
        "VALUES (:id, 'batch', clock_timestamp(), 10, clock_timestamp() + interval '1 hour')",
        id=batch,
    )

    assert backlog(database) == (len(claim.seqs), 0.0)  # what runs goes on

    execute(database, "UPDATE budgets SET waits_until = clock_timestamp()")
    assert backlog(database)[0] == 4


@pytest.mark.parametrize(
    "lacking",
    [
        "UPDATE collections SET lost = true",
        "INSERT INTO vector_removals (index_name, passage_id) VALUES ('one', 7)",
        "INSERT INTO passages (document_id, collection_id, place, start_char, end_char, tokens, digest, content, "
        "vector) SELECT id, collection_id, 0, 0, 4, 1, '', 'text', '' FROM documents",
    ],
)
def test_what_chroma_has_not_been_told_of_is_a_job(database: Database, lacking: str) -> None:
    add(database, "text", collection="papers")
    execute(database, "UPDATE documents SET state = 'ready'")
    assert backlog(database, "documents") == (0, 0.0)

    execute(database, lacking)

    assert backlog(database, "documents") == (1, 0.0)


def test_the_role_reads_the_view_and_no_table(database: Database, postgres_url: str, tmp_path: Path) -> None:
    store_batch(database, tmp_path, chats(7))
    relations = rows(
        database,
        """SELECT relname FROM pg_class WHERE relnamespace = CAST('public' AS regnamespace)
           AND relkind IN ('r', 'p', 'v', 'm', 'S')""",
    )
    with reader_of(postgres_url) as reader:
        assert reader.execute("SELECT jobs FROM backlog WHERE node = 'generation'").fetchall() == [(7,)]
        readable = [name for (name,) in relations if may_read(reader, name)]
        assert readable == ["backlog"]
        assert len(relations) > 30
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            reader.execute("CREATE TABLE backlog_notes (note text)")
        reader.execute("SET default_transaction_read_only = off")
        for statement in (
            "CREATE TABLE backlog_notes (note text)",
            "DELETE FROM batches",
            "UPDATE backlog SET jobs = 0",
        ):
            with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState)):
                reader.execute(statement)


def test_the_queries_of_the_scalers_count_workers(database: Database, postgres_url: str, tmp_path: Path) -> None:
    """As KEDA asks, and as the autoscaler divides: an AverageValue."""
    store_batch(database, tmp_path, chats(1000), shard_jobs=64)
    for number in range(3):
        add(database, f"text {number}", name=f"{number}.txt")

    def wanted(after_s: float) -> dict[str, int]:
        execute(
            database, "UPDATE batches SET in_progress_at = clock_timestamp() - make_interval(secs => :s)", s=after_s
        )
        execute(database, "UPDATE documents SET created_at = clock_timestamp() - make_interval(secs => :s)", s=after_s)
        return {name: workers_wanted(reader, triggers) for name, triggers in scalers().items()}

    with reader_of(postgres_url) as reader:
        assert wanted(0) == {"worker-gpu": 1, "worker-documents": 1}
        assert wanted(3600 - 60) == {"worker-gpu": 4, "worker-documents": 2}  # three documents: two workers of two
        assert wanted(100 * HOUR_S) == {"worker-gpu": 16, "worker-documents": 2}  # 16 shards
        execute(database, "UPDATE batches SET paused_reason = 'too many fail'")
        execute(database, "DELETE FROM documents")
        assert wanted(HOUR_S) == {"worker-gpu": 0, "worker-documents": 0}


def scalers() -> dict[str, list[dict[str, str]]]:
    """The triggers' metadata of each ScaledObject."""
    objects = [yaml.safe_load((KEDA / f"{name}.yaml").read_text()) for name in ("worker-gpu", "worker-documents")]
    return {
        one["spec"]["scaleTargetRef"]["name"]: [trigger["metadata"] for trigger in one["spec"]["triggers"]]
        for one in objects
    }


def workers_wanted(reader: psycopg.Connection, triggers: list[dict[str, str]]) -> int:
    """The most that a trigger asks for; none while no trigger is above its activation."""
    answered = []
    for trigger in triggers:
        row = reader.execute(trigger["query"].encode()).fetchone()
        assert row is not None
        answered.append((float(row[0]), trigger))
    if not any(value > float(trigger["activationTargetQueryValue"]) for value, trigger in answered):
        return 0
    return max(1, *(math.ceil(value / float(trigger["targetQueryValue"])) for value, trigger in answered))


def may_read(reader: psycopg.Connection, name: str) -> bool:
    try:
        reader.execute(sql.SQL("SELECT * FROM {} LIMIT 1").format(sql.Identifier(name)))
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True


@contextmanager
def reader_of(postgres_url: str) -> Iterator[psycopg.Connection]:
    """Who connects as the role of backlog-role.sql, here by a name of its own: roles are the whole server's."""
    role, password = f"stoker_backlog_{uuid4().hex[:8]}", "a 'quoted' password"
    owner_url = libpq_url(make_url(postgres_url))
    for _ in range(2):  # safe to repeat
        subprocess.run(
            [tools_for(postgres_url) / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", owner_url],
            input=ROLE_SQL.replace("stoker_backlog", role),
            env={**os.environ, "BACKLOG_PASSWORD": password},
            check=True,
            text=True,
        )
    try:
        with psycopg.connect(owner_url, user=role, password=password, autocommit=True) as reader:
            yield reader
    finally:
        with psycopg.connect(owner_url, autocommit=True) as owner:
            owner.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))
