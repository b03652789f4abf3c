"""The semantic cache in a worker child, on real Postgres, Redis and Chroma: what it serves and what never."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from cache.index import Emptied, Index
from cache.keys import collection_name
from models.states import CacheMode
from pipeline.cached import Place
from pipeline.certify import Certified, certified
from pipeline.export import line
from pipeline.semantic import LEAST_NEIGHBOURS
from store.answers import delete_expired
from store.batches import batch_progress, finish
from store.cache_reports import cache_totals, clear_checkpoint, clear_template, namespace_reports, set_ttl
from store.database import Database
from store.engines import register_engine
from store.namespaces import OpenNamespace
from store.results import result_pages
from tests.conftest import empty_database
from tests.support.batches import dispatch_all, execute, results_of
from tests.support.own_services import OwnChroma, free_port, server_folder
from tests.support.queries import DIMENSIONS, queries
from tests.support.scripted_endpoint import ScriptedEndpoint
from tests.support.semantic_child import Child, answer_topics, namespaces, policy_of, sources

ENOUGH = 2_400  # lookups by which these easy queries are certified
_fresh = itertools.count(1)


@pytest.fixture(scope="module")
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def own_chroma() -> Iterator[OwnChroma]:
    """A server of this test alone, to be killed."""
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture(scope="module")
def topics() -> Iterator[ScriptedEndpoint]:
    """An engine that says the topic of a query, always."""
    with ScriptedEndpoint() as server:
        answer_topics(server)
        yield server


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    """An engine that says the topic of a query until it is told otherwise."""
    with ScriptedEndpoint() as server:
        answer_topics(server)
        yield server


@pytest.fixture
def child(database: Database, endpoint: ScriptedEndpoint, redis_url: str, chroma: OwnChroma) -> Child:
    """A child whose cache is cold."""
    return Child(database, engine_url=endpoint.url, redis_url=redis_url, chroma_url=chroma.url)


@pytest.fixture(scope="module")
def certified_child(
    postgres_template: str,
    topics: ScriptedEndpoint,
    _redis_database: str,
    chroma: OwnChroma,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Child]:
    """A child whose namespace is certified; tests may add to it and must leave it certified."""
    with empty_database(postgres_template) as url:
        database = Database(url, pool_size=20)
        made = Child(database, engine_url=topics.url, redis_url=_redis_database, chroma_url=chroma.url)
        made.run(tmp_path_factory.mktemp("certified"), queries(ENOUGH))
        yield made
        database.close()


def fresh(count: int) -> list[str]:
    """Queries that no other test has asked."""
    return queries(count, seed=next(_fresh))


def certificate(database: Database) -> Certified:
    with database.transaction() as session:
        return certified(namespace_reports(session, "local")[0])


def test_a_certified_namespace_serves_right_answers_and_says_from_where(certified_child: Child, tmp_path: Path) -> None:
    database, asked = certified_child.database, fresh(400)
    assert policy_of(database).is_serving, policy_of(database).state()
    before = namespaces(database)[0]
    batch_id = certified_child.run(tmp_path, asked)
    counts = sources(database, batch_id)
    assert counts["semantic"] > 50
    assert counts["semantic"] + counts["engine"] == 400
    for one, query in zip(results_of(database, batch_id), asked, strict=True):
        assert query.split()[-1] in (one.response or "")
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
        totals = cache_totals(session, "local")
    assert progress.served == counts["semantic"]
    assert progress.saved_tokens > 0
    assert totals.semantic >= counts["semantic"]
    lines = [json.loads(line(batch_id, row))["stoker"] for page in result_pages(database, batch_id) for row in page]
    served = [one for one in lines if one["source"] == "semantic"]
    assert all(one["similarity"] > 0.5 and one["entry"] and one["namespace"] == before["id"] for one in served)
    after = namespaces(database)[0]
    assert after["served"] - before["served"] == counts["semantic"]
    assert after["lookups"] - before["lookups"] == 400
    assert after["asked_twice"] >= 200
    assert after["differed"] == 0
    said = certificate(database)
    assert said.state == "serving"
    assert said.error_bound <= 0.01
    assert f"{said.settled:,} lookups" in said.sentence and f"at most {said.at_most} of" in said.sentence
    assert said.error_bound <= float(said.at_most.removesuffix("%")) / 100 <= said.error_bound + 0.0001
    assert "of the worst 1,000 of the lookups still kept" in said.sentence


def test_a_shard_may_be_served_as_a_whole(certified_child: Child, tmp_path: Path) -> None:
    batch_id = certified_child.run(tmp_path, fresh(32), shard_jobs=1)
    assert sources(certified_child.database, batch_id)["semantic"] > 0


def test_a_job_that_others_follow_is_never_served_by_a_similar_one(certified_child: Child, tmp_path: Path) -> None:
    """So what is served has no followers, and counts as one job in the metrics."""
    asked = fresh(60)
    batch_id = certified_child.run(tmp_path, [*asked, *asked])
    assert sources(certified_child.database, batch_id) == {"engine": 60, "duplicate": 60}


def test_nothing_is_served_across_tenants_checkpoints_or_sampling(certified_child: Child, tmp_path: Path) -> None:
    database = certified_child.database
    other_tenant = certified_child.run(tmp_path, fresh(64), tenant="other")
    other_sampling = [
        certified_child.run(tmp_path, fresh(64), seed=3),
        certified_child.run(tmp_path, fresh(64), top_k=5),
    ]
    asked = fresh(64)
    certified_child.engine_id, own = _engine(database, "5678"), certified_child.engine_id
    other_checkpoint = certified_child.run(tmp_path, asked)
    certified_child.engine_id = own
    for batch_id in (other_tenant, *other_sampling, other_checkpoint):
        assert sources(database, batch_id) == {"engine": 64}


def _engine(database: Database, digest: str) -> int:
    with database.transaction() as session:
        return register_engine(session, {"checkpoint_digest": digest})


def test_lines_and_batches_that_do_not_ask_for_it_are_not_served(certified_child: Child, tmp_path: Path) -> None:
    database = certified_child.database
    before = namespaces(database)[0]["lookups"]
    exact = certified_child.run(tmp_path, fresh(64), mode=CacheMode.EXACT)
    off = certified_child.run(tmp_path, fresh(64), stoker={"cache": "off"})
    sampled = certified_child.run(tmp_path, fresh(64), temperature=0.8)
    assert [sources(database, one) for one in (exact, off, sampled)] == [{"engine": 64}] * 3
    assert namespaces(database)[0]["lookups"] == before
    line_wise = certified_child.run(tmp_path, fresh(128), mode=CacheMode.EXACT, stoker={"cache": "semantic"})
    assert sources(database, line_wise)["semantic"] > 10


def test_numbers_ids_dates_negations_and_quotes_are_not_overlooked(certified_child: Child, tmp_path: Path) -> None:
    """Each differs from all entries in what a guard compares; the topic, and so the vector, is an entry's.

    In one shard, which is looked up as a whole: none meets an entry that another of them has made.
    """
    changed = ["3 of", "not", "order A-17", "on monday", '"gold"', "12%", "never"]
    asked = [f"{changed[place % len(changed)]} {query}" for place, query in enumerate(fresh(112))]
    batch_id = certified_child.run(tmp_path, asked, shard_jobs=112)
    assert sources(certified_child.database, batch_id) == {"engine": 112}


def test_a_job_is_looked_up_once_however_often_it_is_tried(
    child: Child, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    database, asked = child.database, fresh(64)
    endpoint.script("[[fail 1 times]]", match=PREFIX_START)
    batch_id = child.submit(tmp_path, asked)
    while finish_count(database, batch_id) < 64:
        execute(database, "UPDATE job_tries SET not_before = now()")
        execute(database, "UPDATE shards SET not_before = now() WHERE state = 'pending'")
        dispatch_all(database)
        child.restart()
        child.feed()
    assert endpoint.calls().count >= 128
    assert namespaces(database)[0]["lookups"] == 64
    with database.transaction() as session:
        assert session.execute(text("SELECT count(*), count(judged_at) FROM cache_lookups")).one() == (64, 64)


PREFIX_START = "Say in one word"


def finish_count(database: Database, batch_id: object) -> int:
    with database.transaction() as session:
        return int(
            session.execute(text("SELECT count(*) FROM results WHERE batch_id = :id"), {"id": batch_id}).scalar_one()
        )


def test_a_chroma_that_is_down_hangs_or_is_emptied_costs_hits_and_no_job(
    tmp_path: Path, own_chroma: OwnChroma, database: Database, topics: ScriptedEndpoint, redis_url: str
) -> None:
    child = Child(database, engine_url=topics.url, redis_url=redis_url, chroma_url=own_chroma.url)
    first = fresh(128)
    assert sources(database, child.run(tmp_path, first)) == {"engine": 128}
    own_chroma.kill()
    child.restart()
    assert sources(database, child.run(tmp_path, fresh(128))) == {"engine": 128}
    with database.transaction() as session:
        assert cache_totals(session, "local").unlooked == 128
    own_chroma.start()
    own_chroma.signal(signal.SIGSTOP)
    child.restart()
    try:
        assert sources(database, child.run(tmp_path, fresh(64))) == {"engine": 64}
    finally:
        own_chroma.signal(signal.SIGCONT)
    own_chroma.empty()
    own_chroma.start()
    child.restart()
    child.run(tmp_path, fresh(64))  # finds nothing, and fills the index from Postgres beside
    [known] = namespaces(database)
    assert Index(own_chroma.url).size(collection_name(known["secret"])) == 128 + 128 + 64 + 64


def test_a_collection_is_asked_while_its_first_entries_are_added(chroma: OwnChroma) -> None:
    vectors = np.random.default_rng(0).standard_normal((64, 384)).astype(np.float32)
    writer, reader = Index(chroma.url), Index(chroma.url)

    def ask(name: str) -> int:
        found = 0
        while found < 64:
            with suppress(Emptied):
                found = len(reader.nearest(name, vectors, count=64)[0].ids)
        return found

    with ThreadPoolExecutor() as pool:
        for number in range(40):
            asked = pool.submit(ask, f"collection-{number}")
            writer.make(f"collection-{number}")
            writer.add(f"collection-{number}", range(64), vectors)
            assert asked.result(timeout=20) == 64


def test_a_namespace_has_a_collection_only_when_its_entries_are_enough_to_be_asked(
    child: Child, tmp_path: Path
) -> None:
    child.run(tmp_path, fresh(LEAST_NEIGHBOURS - 1))
    child.run(tmp_path, fresh(3), tenant="other")
    assert [size_of(child, one) for one in namespaces(child.database)] == [None, None]
    for entries in (LEAST_NEIGHBOURS + 7, LEAST_NEIGHBOURS + 15):
        child.run(tmp_path, fresh(8))
        assert [size_of(child, one) for one in namespaces(child.database)] == [entries, None]


def test_an_answer_that_comes_after_a_clear_makes_no_collection_again(child: Child, tmp_path: Path) -> None:
    child.run(tmp_path, fresh(32))
    [known] = namespaces(child.database)
    assert size_of(child, known) == 32
    with child.database.transaction() as session:
        clear_template(session, "local", known["id"])
    Index(child.settings.chroma_url or "").drop(collection_name(known["secret"]))
    namespace = OpenNamespace(known["id"], known["key"], known["secret"], None)
    child.semantic.add([(Place(namespace, "a refund", np.ones(DIMENSIONS, np.float32).tobytes()), 1)])
    child.semantic.do_chores()
    assert size_of(child, known) is None


def test_the_collection_of_an_idle_namespace_goes_with_it(
    database: Database, tmp_path: Path, own_chroma: OwnChroma, topics: ScriptedEndpoint, redis_url: str
) -> None:
    child = Child(database, engine_url=topics.url, redis_url=redis_url, chroma_url=own_chroma.url)
    child.run(tmp_path, fresh(32))
    [idle] = namespaces(database)
    execute(database, "DELETE FROM cache_entries")
    execute(database, "UPDATE cache_namespaces SET used_at = used_at - interval '31 days'")
    own_chroma.kill()
    child.restart()
    child.semantic.do_chores()
    assert len(namespaces(database)) == 1, "nothing would ever drop its collection"
    own_chroma.start()
    assert size_of(child, idle) == 32
    child.restart()
    assert child.semantic.has_chores
    child.semantic.do_chores()
    assert not child.semantic.has_chores
    assert namespaces(database) == []
    assert size_of(child, idle) is None


def size_of(child: Child, namespace: dict[str, Any]) -> int | None:
    """How many entries of a namespace Chroma has; None if it has no collection for it."""
    try:
        return Index(child.settings.chroma_url or "").size(collection_name(namespace["secret"]))
    except Emptied:
        return None


def test_free_text_is_never_served_and_certify_says_so(
    child: Child, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    answer_topics(endpoint, prefix="a long answer that goes on and on about many things and at last names ")
    batch_id = child.run(tmp_path, fresh(700), max_tokens=64)
    assert sources(child.database, batch_id) == {"engine": 700}
    said = certificate(child.database)
    assert said.state == "shadow"
    assert "700 of 700 answers are free text" in said.why[-1]


def test_an_engine_that_disagrees_with_itself_is_named_as_the_reason(
    child: Child, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    endpoint.script("[[later answer maybe]]", match=" refund\n")
    child.run(tmp_path, fresh(640))
    said = certificate(child.database)
    assert said.asked_twice >= 200
    assert 0.1 < (said.self_disagreement or 0) < 0.4
    assert any("the engine disagrees with itself" in one for one in said.why)


def test_a_drift_suspends_serving_before_the_statement_is_false(
    child: Child, tmp_path: Path, endpoint: ScriptedEndpoint
) -> None:
    database = child.database
    child.run(tmp_path, fresh(ENOUGH))
    assert policy_of(database).is_serving
    answer_topics(endpoint, prefix="new_")
    asked = fresh(1_000)
    batch_id = child.run(tmp_path, asked)
    wrong = sum("new_" not in (one.response or "") for one in results_of(database, batch_id))
    assert wrong <= 0.01 * (ENOUGH + 1_000)
    assert not policy_of(database).is_serving


def test_what_a_batch_leaves_unjudged_counts_against_the_cache(certified_child: Child, tmp_path: Path) -> None:
    database = certified_child.database
    batch_id = certified_child.submit(tmp_path, fresh(8))
    before = policy_of(database)
    execute(
        database,
        "INSERT INTO cache_lookups (batch_id, seq, namespace_id, version, place, served_beside, coin, rate, wished, "
        "in_shadow, audited, answer, features) "
        "VALUES (:id, 0, :ns, :version, 10, 0, 0.01, :rate, true, false, true, 'label:card', :none)",
        id=batch_id,
        ns=namespaces(database)[0]["id"],
        version=before.version,
        rate=before.rate,
        none=b"\0" * 4,
    )
    assert certificate(database).settled == 10, "lookups after an audit that is out are not settled"
    execute(database, "UPDATE batches SET state = 'finalizing', total = 0 WHERE id = :id", id=batch_id)
    with database.transaction() as session:
        finish(session, batch_id)
        judged = session.execute(
            text("SELECT agreed FROM cache_lookups WHERE batch_id = :id"), {"id": batch_id}
        ).scalar_one()
        session.execute(text("DELETE FROM cache_lookups WHERE batch_id = :id"), {"id": batch_id})
    assert judged is None


def test_another_checkpoints_answers_judge_no_lookup(child: Child, tmp_path: Path, endpoint: ScriptedEndpoint) -> None:
    database = child.database
    child.run(tmp_path, fresh(64))
    child.submit(tmp_path, fresh(64))
    dispatch_all(database)
    child.engine_url = f"http://127.0.0.1:{free_port()}"
    child.feed()  # looks all up, and finds no engine
    child.engine_url, child.engine_id = endpoint.url, _engine(database, "other")
    execute(database, "UPDATE shards SET state = 'dispatched', not_before = NULL WHERE state = 'pending'")
    assert child.feed().jobs == 64
    with database.transaction() as session:
        rows = session.execute(
            text("SELECT namespace_id, judged_at IS NULL, agreed IS NULL, count(*) FROM cache_lookups GROUP BY 1, 2, 3")
        ).all()
    known = namespaces(database)[0]["id"]
    assert sorted(rows) == [(known, False, False, 64), (known, False, True, 64)]


def test_audits_that_the_policy_has_not_heard_of_are_not_settled(certified_child: Child, tmp_path: Path) -> None:
    database = certified_child.database
    certified_child.run(tmp_path, fresh(128))
    said = certificate(database)
    with database.transaction() as session:
        [unheard] = session.scalars(text("SELECT min(place) FROM cache_lookups WHERE audited AND NOT folded"))
    assert unheard is not None, "of 128 lookups some were audited"
    assert said.settled == unheard < said.lookups
    assert said.decided < policy_of(database).decided
    assert f"{said.settled:,} lookups (limit" in said.sentence and f"{said.decided:,} decisions" in said.sentence


def test_clearing_makes_answers_old_by_template_and_checkpoint(child: Child, tmp_path: Path) -> None:
    database, asked = child.database, fresh(64)
    child.run(tmp_path, asked)
    assert sources(database, child.run(tmp_path, asked)) == {"exact": 64}
    with database.transaction() as session:
        gone = clear_template(session, "local", namespaces(database)[0]["id"])
    assert (len(gone.keys), len(gone.secrets)) == (64, 1)
    assert sources(database, child.run(tmp_path, asked)) == {"engine": 64}, "also what Redis still has"
    with database.transaction() as session:
        clear_checkpoint(session, "local", "1234")
    assert sources(database, child.run(tmp_path, asked)) == {"engine": 64}
    assert len(namespaces(database)) == 1


def test_a_namespace_may_have_a_time_to_live_of_its_own(child: Child, tmp_path: Path) -> None:
    database, asked = child.database, fresh(32)
    child.run(tmp_path, asked)
    with database.transaction() as session:
        changed = set_ttl(session, "local", namespaces(database)[0]["id"], ttl_s=3600.0)
    assert len(changed.keys) == 32
    execute(database, "UPDATE cache_entries SET expires_at = now() - interval '1 s'")
    with database.transaction() as session:
        delete_expired(session)
    child.run(tmp_path, fresh(32))
    with database.transaction() as session:
        lives = session.execute(text("SELECT max(expires_at - created_at) FROM cache_entries")).scalar_one()
    assert lives.total_seconds() == pytest.approx(3600, abs=1)


def test_a_prompt_that_postgres_would_refuse_to_keep_runs_all_the_same(child: Child, tmp_path: Path) -> None:
    batch_id = child.run(tmp_path, ["a \0 refund", *fresh(4)])
    assert sources(child.database, batch_id) == {"engine": 5}
    assert namespaces(child.database)[0]["lookups"] == 4


def test_a_collections_name_is_the_namespaces_own() -> None:
    assert collection_name(b"1") != collection_name(b"2")
