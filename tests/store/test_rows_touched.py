"""What a worker asks for one shard must touch that shard's rows, whatever Postgres's statistics say of its batch.

They are always wrong about the newest batch: rows that were just written are in no statistics, and a prepared plan may
be older than the rows. A plan that reads the whole batch for each shard makes it quadratic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from store import results
from store.answers import NewAnswer, answers_of, find_answers, keep_answers, living
from store.database import Database, Session
from store.followers import leaders_among, settings_of_followers
from store.namespaces import Verdict, find_answers_of, find_facts, judge_lookups, lookups_of, stocked
from store.open_shards import OpenShard, jobs_to_run
from store.results import PAGE_ROWS
from store.shards import Claim, load_jobs, write_results
from tests.conftest import empty_database
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, store_batch

SHARD = 64
ROWS = 20_000
RUNS = 12  # the driver prepares a statement after 5, the server fixes its plan after 5 more
TENANT = "new"
NAMESPACE = 7
OLD_NAMESPACE = 6
NEAR = list(range(1, 24 * SHARD))

Question = Callable[[Session, Claim], object]
# And how many rows it may touch: of a shard's jobs, or of their neighbours, some times each.
FEW, MANY = 6 * SHARD, 3 * len(NEAR)
QUESTIONS: dict[str, tuple[Question, int]] = {
    "a page of results": (lambda s, c: results._page(s, c.batch_id, first=ROWS // 2), 3 * PAGE_ROWS),
    "a page after the 32,767th line": (lambda s, c: results._page(s, c.batch_id, first=32_000), 3 * PAGE_ROWS),
    "leaders of a page": (lambda s, c: results._leaders(s, c.batch_id, list(range(SHARD, 2_000))), 3 * PAGE_ROWS),
    "load_jobs": (load_jobs, FEW),
    "jobs_to_run": (lambda s, c: jobs_to_run(s, c.batch_id, [scattered(s, c)]), FEW),
    "write_results": (lambda s, c: write_results(s, c, answers(c.seqs), engine_id=None, lease_s=LEASE_S), FEW),
    "write_results with followers": (
        lambda s, c: write_results(s, replace(c, followers=True), answers(c.seqs), engine_id=None, lease_s=LEASE_S),
        FEW,
    ),
    "settings_of_followers": (lambda s, c: settings_of_followers(s, c.batch_id, c.seqs), FEW),
    "leaders_among": (lambda s, c: leaders_among(s, c.batch_id, c.seqs), FEW),
    "find_answers": (lambda s, c: find_answers(s, TENANT, [key_of(seq) for seq in c.seqs]), FEW),
    "living": (lambda s, c: living(s, TENANT, {key_of(seq): seq + 1 for seq in c.seqs}), FEW),
    "answers_of": (lambda s, c: answers_of(s, NAMESPACE, {seq + 1: "label:yes" for seq in c.seqs}), FEW),
    "keep_answers": (lambda s, c: keep_answers(s, TENANT, c.batch_id, [new_answer(seq) for seq in c.seqs]), FEW),
    "find_answers_of": (lambda s, c: find_answers_of(s, NAMESPACE, NEAR), MANY),
    "find_facts": (lambda s, c: find_facts(s, NAMESPACE, NEAR), MANY),
    "stocked": (lambda s, c: stocked(s, [NAMESPACE, OLD_NAMESPACE, 8], least=SHARD), FEW),
    "lookups_of": (lambda s, c: lookups_of(s, c.batch_id, c.seqs), FEW),
    "judge_lookups": (
        lambda s, c: judge_lookups(s, c.batch_id, [Verdict(seq, "yes", None, 1) for seq in c.seqs], checkpoint=""),
        FEW,
    ),
}


def scattered(session: Session, claim: Claim) -> OpenShard:
    """A shard of as many jobs from all over the batch, as an order for prefixes makes them."""
    last = session.execute(text("SELECT max(seq) FROM jobs WHERE batch_id = :id"), {"id": claim.batch_id}).scalar_one()
    return OpenShard(claim.shard_id, [place * last // SHARD for place in range(SHARD)], tokens=100 * SHARD)


def key_of(seq: int) -> bytes:
    """The key of an answer."""
    return b"key-%d" % seq


def new_answer(seq: int) -> NewAnswer:
    """An answer to keep."""
    return NewAnswer(
        key=key_of(seq), seq=seq, response="{}", status_code=200, prompt_tokens=1, completion_tokens=1, ttl_s=600
    )


_NAMESPACE = """
    INSERT INTO cache_namespaces (id, tenant, key, endpoint, alias, checkpoint, embedder, template, scope, secret,
        policy) OVERRIDING SYSTEM VALUE VALUES (:id, 't', :key, '', '', '', '', '', '', '', '')"""
_PLAIN_TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = CAST('public' AS regnamespace)"
_TABLES = ("jobs", "results", "followers", "cache_entries", "cache_lookups")


def claim_of_new_batch(database: Database, folder: Path) -> Claim:
    """A claimed shard of a batch in which nobody follows and that has no lookups."""
    store_batch(database, folder, chats(SHARD), tenant=TENANT)
    with database.transaction() as session:
        for namespace in (OLD_NAMESPACE, NAMESPACE):
            session.execute(text(_NAMESPACE), {"id": namespace, "key": b"%d" % namespace})
        for name in session.scalars(text(_PLAIN_TABLES)).all():  # no statistics come in while all questions are asked
            session.execute(text(f"ALTER TABLE {name} SET (autovacuum_enabled = off)"))
    return claimed(database, dispatch_all(database)[0])


@contextmanager
def worker_of(url: str, **options: bool) -> Iterator[Database]:
    """One connection, as a worker's child has it."""
    opened = Database(url, pool_size=1, **options)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def beside_an_older_batch(
    postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Claim]]:
    """A database whose statistics know only an older batch, and a shard of the new one; a question leaves no trace."""
    with empty_database(postgres_template) as url, worker_of(url) as database:
        shard = claim_of_new_batch(database, tmp_path_factory.mktemp("shard"))
        fill(database, uuid4(), tenant="old", namespace=OLD_NAMESPACE)
        analyze(database)
        fill(database, shard.batch_id, tenant=TENANT, namespace=NAMESPACE)
        yield url, shard


@pytest.fixture(scope="module")
def planned_before(
    postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Database, Claim]]:
    """A worker that has asked every question while the tables were almost empty; now they are not."""
    with empty_database(postgres_template) as url, worker_of(url) as database, worker_of(url, by_key=True) as worker:
        shard = claim_of_new_batch(database, tmp_path_factory.mktemp("shard"))
        fill(database, uuid4(), tenant="old", namespace=OLD_NAMESPACE, rows=20)
        analyze(database)
        for question, _ in QUESTIONS.values():
            most_touched(worker, shard, question)
        fill(database, shard.batch_id, tenant=TENANT, namespace=NAMESPACE)
        yield worker, shard


def fill(database: Database, batch_id: UUID, *, tenant: str, namespace: int, rows: int = ROWS) -> None:
    """So many jobs with results, followers, entries and lookups after those of the shard."""
    seqs = f"generate_series({SHARD}, {SHARD + rows - 1}) AS g"
    with database.transaction() as session:
        for statement in (
            "INSERT INTO jobs (batch_id, seq, custom_id, body) SELECT :id, g, 'id-' || g, '{}'",
            "INSERT INTO results (batch_id, seq, outcome, source, prompt_tokens, completion_tokens, cached_tokens, "
            "reasoning_tokens, duration_ms) SELECT :id, g, 'succeeded', 'engine', 0, 0, 0, 0, 0",
            "INSERT INTO followers (batch_id, seq, leader) SELECT :id, g, g - 1",
            "INSERT INTO cache_entries (tenant, key, response, status_code, prompt_tokens, completion_tokens, "
            "batch_id, seq, expires_at, namespace_id, payload, answer) SELECT :tenant, convert_to('key-' || g, "
            "'UTF8'), '{}', 200, 0, 0, :id, g, now() + interval '1 hour', :namespace, '', 'label:yes'",
            "INSERT INTO cache_lookups (batch_id, seq, namespace_id, version, place, served_beside, coin, rate, "
            "wished, in_shadow, audited, decided) SELECT :id, g, :namespace, 1, 0, 0, 0, 0, false, false, false, 0",
        ):
            session.execute(
                text(f"{statement} FROM {seqs}"), {"id": batch_id, "tenant": tenant, "namespace": namespace}
            )


def analyze(database: Database) -> None:
    """Let Postgres know what is in the tables now."""
    with database.transaction() as session:
        for table in _TABLES:
            session.execute(text(f"ANALYZE {table}"))


def most_touched(database: Database, shard: Claim, question: Question) -> int:
    """Rows read by one call, whole tables or by indexes, the worst of RUNS; nothing of it stays."""
    most = 0
    with database.transaction() as session:
        for _ in range(RUNS):
            before = _touched(session)
            question(session, shard)
            most = max(most, _touched(session) - before)
        session.rollback()
    return most


def _touched(session: Session) -> int:
    return int(
        session.execute(
            text("SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables")
        ).scalar_one()
    )


@pytest.mark.parametrize("name", QUESTIONS)
def test_when_statistics_know_only_an_older_batch(beside_an_older_batch: tuple[str, Claim], name: str) -> None:
    url, shard = beside_an_older_batch
    with worker_of(url) as worker:
        assert most_touched(worker, shard, QUESTIONS[name][0]) <= QUESTIONS[name][1]


@pytest.mark.parametrize("name", QUESTIONS)
def test_when_it_was_planned_for_tables_that_were_almost_empty(
    planned_before: tuple[Database, Claim], name: str
) -> None:
    worker, shard = planned_before
    assert most_touched(worker, shard, QUESTIONS[name][0]) <= QUESTIONS[name][1]
