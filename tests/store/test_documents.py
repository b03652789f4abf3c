"""Documents' rows: added once, claimed under a fence, recovered, ended; and what their reading does with errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime.errors import NotFound, Permanent, Transient
from store.database import Database
from store.documents import (
    CRASHES_TO_POISON,
    Added,
    DocumentClaim,
    NewDocument,
    ReadDocument,
    Tally,
    add_document,
    claim_document,
    collection_named,
    end_document,
    extend_document_leases,
    fail_document,
    hold_document,
    list_collections,
    list_documents,
    made_collection,
    postpone_document,
    recover_documents,
    remove_collection,
    remove_documents,
    tally_of,
    text_of_document,
    waiting_documents,
)
from store.passages import forget_removals, removals_of, replace_passages
from tests.support.batches import execute
from tests.support.cooking import add, read_all
from tests.support.waiting import wait_until

LEASE_S = 30.0


def added(
    database: Database, digest: str | None, *, failure: tuple[str, str] | None = None, force: bool = False
) -> Added:
    """What adding these bytes under one name does."""
    content = None if digest is None else digest.encode()
    with database.transaction() as session:
        into = made_collection(session, "local", "c")
        document = NewDocument("/docs/one", content, digest, failure=failure)
        return add_document(session, document, tenant="local", collection_id=into, force=force)[1]


def claimed(database: Database) -> DocumentClaim:
    with database.transaction() as session:
        taken = claim_document(session, lease_s=LEASE_S)
    assert taken is not None
    return taken


def expire(database: Database) -> list[tuple[int, int]]:
    """Let every lease be over, and recover."""
    execute(database, "UPDATE documents SET lease_until = clock_timestamp() - interval '1 s' WHERE state = 'running'")
    with database.transaction() as session:
        return recover_documents(session, lease_s=0.0)


def states(database: Database) -> list[tuple[str, str | None]]:
    with database.transaction() as session:
        return [(row.state.value, row.error_code) for row in list_documents(session, tenant="local")]


def test_bytes_are_read_once_by_source_and_digest(database: Database) -> None:
    assert [added(database, digest) for digest in ("a", "a", "b", "b")] == [
        Added.NEW,
        Added.UNCHANGED,
        Added.CHANGED,
        Added.UNCHANGED,
    ]
    claim = claimed(database)
    assert added(database, "b") is Added.UNCHANGED, "it is being read"
    with database.transaction() as session:
        assert fail_document(session, claim, code="corrupt_document", message="bad")
    assert added(database, "b") is Added.AGAIN, "a failed one is tried again"
    assert added(database, "b", force=True) is Added.AGAIN


def test_what_is_refused_as_it_is_added_is_not_read(database: Database) -> None:
    refused = ("too_large", "one has 9 bytes, more than the 5 of the limit")
    assert added(database, None, failure=refused) is Added.NEW
    assert added(database, "a") is Added.CHANGED
    assert added(database, None, failure=refused) is Added.AGAIN, "its earlier bytes still wait"
    assert states(database) == [("failed", "too_large")]
    execute(database, "ALTER TABLE document_bytes ADD CHECK (false)")  # it holds only if no row is left


def test_a_url_is_fetched_each_time_it_is_added(database: Database) -> None:
    assert (added(database, None), added(database, None)) == (Added.NEW, Added.UNCHANGED), "it waits already"
    claim = claimed(database)
    with database.transaction() as session:
        assert hold_document(session, claim)
        end_document(session, claim, ReadDocument("a", 1, "text", None, "text", 0.1), passages=0)
    assert added(database, None) is Added.AGAIN


def test_an_attempt_that_lost_its_document_writes_nothing(database: Database) -> None:
    added(database, "a")
    late = claimed(database)
    added(database, "b")
    with database.transaction() as session:
        assert not hold_document(session, late)
        assert not fail_document(session, late, code="late", message="")
    assert claimed(database).fence > late.fence
    assert states(database) == [("running", None)]


def test_a_document_whose_readers_die_ends_as_poison_without_its_bytes(database: Database) -> None:
    added(database, "a")
    for crashes in range(1, CRASHES_TO_POISON + 1):
        identifier = claimed(database).id
        assert expire(database) == [(identifier, crashes)]
    assert states(database) == [("failed", "poison_document")]
    with database.transaction() as session:
        [row] = list_documents(session, tenant="local")
    assert (row.error_message or "").startswith("/docs/one: ")
    with database.transaction() as session:
        assert waiting_documents(session, limit=5, with_index=False) == 0
    execute(database, "ALTER TABLE document_bytes ADD CHECK (false)")  # it holds only if no row is left


def test_a_lease_that_is_kept_is_not_recovered_and_one_of_another_fence_not_kept(database: Database) -> None:
    added(database, "a")
    claim = claimed(database)
    with database.transaction() as session:
        assert recover_documents(session, lease_s=0.0) == []
        assert extend_document_leases(session, {claim.id: claim.fence}, lease_s=LEASE_S) == {claim.id: True}
        assert extend_document_leases(session, {claim.id: claim.fence - 1}, lease_s=LEASE_S) == {}
    assert expire(database) == [(claim.id, 1)]
    with database.transaction() as session:
        assert extend_document_leases(session, {claim.id: claim.fence}, lease_s=LEASE_S) == {}
        assert not postpone_document(session, claim, wait_s=9.0, counted=True)
    again = claimed(database)
    with database.transaction() as session:
        assert postpone_document(session, again, wait_s=0.0, counted=False)
    assert expire(database) == []
    assert [expire(database) for _ in range(CRASHES_TO_POISON) if claimed(database)][-1] == [
        (claim.id, CRASHES_TO_POISON)
    ], "one that was given back had not crashed"


def test_what_is_removed_is_written_down_for_chroma(database: Database) -> None:
    for name in ("a.txt", "b.txt"):
        add(database, f"of {name}", name=name, collection="c")
    add(database, "of another", name="a.txt", collection="d")
    read_all(database)
    with database.transaction() as session:
        stored, other = (collection_named(session, "local", name) for name in ("c", "d"))
        assert remove_documents(session, ["/docs/a.txt", "/docs/none"], tenant="local", collection_id=stored.id) == [
            "/docs/a.txt"
        ]
        [gone] = removals_of(session, stored.index_name, limit=9)
        assert removals_of(session, other.index_name, limit=9) == []
        assert dict(list_collections(session, tenant="local")) == {
            name: Tally(ready=1, passages=1, unindexed=1) for name in ("c", "d")
        }
        assert remove_collection(session, tenant="local", collection_id=stored.id) == 1
        assert removals_of(session, stored.index_name, limit=9)[:2] == [0, gone]
        assert [name for name, _ in list_collections(session, tenant="local")] == ["d"]
        forget_removals(session, stored.index_name, None)
        assert removals_of(session, stored.index_name, limit=9) == []


def test_a_collection_is_removed_beside_a_reader_that_writes_into_it(database: Database) -> None:
    added(database, "a")
    claim = claimed(database)

    def remove() -> int:
        with database.transaction() as session:
            stored = collection_named(session, "local", "c")
            return remove_collection(session, tenant="local", collection_id=stored.id)

    with ThreadPoolExecutor(1) as other:
        with database.transaction() as session:
            assert hold_document(session, claim)
            removed = other.submit(remove)
            wait_until(lambda: waiting(database), 10, "the removal waits for the reader")
            assert replace_passages(session, claim, [], [], embedder="e")
            end_document(session, claim, ReadDocument("a", 1, "text", None, "text", 0.1), passages=0)
        assert removed.result() == 1
    assert states(database) == []


def waiting(database: Database) -> bool:
    """Whether a transaction of this database waits for another."""
    with database.transaction() as session:
        return bool(
            session.connection()
            .exec_driver_sql(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
                " AND wait_event_type = 'Lock')"
            )
            .scalar_one()
        )


def test_the_tally_counts_by_state(database: Database) -> None:
    ids = [add(database, content, name=content, collection="c") for content in ("It was so.", "broken")]
    read_all(database)
    later = [add(database, f"later {number}", name=f"later-{number}", collection="c") for number in range(2)]
    claimed(database)
    with database.transaction() as session:
        tally = tally_of(session, [*ids, *later])
        assert (
            tally == Tally(pending=1, running=1, ready=1, failed=1, passages=1, unindexed=1) == tally_of(session, None)
        )
        assert (tally.ended, tally.total) == (2, 4)
        assert tally_of(session, []) == Tally()


def test_tenants_have_documents_of_one_name_each(database: Database) -> None:
    ids = [add(database, f"of {tenant}", collection="c", tenant=tenant) for tenant in ("local", "other")]
    read_all(database)
    with database.transaction() as session:
        into = made_collection(session, "other", "c")
        assert remove_documents(session, ["/docs/a.txt"], tenant="local", collection_id=into) == []
        assert remove_documents(session, ["/docs/a.txt"], tenant="other", collection_id=into) == ["/docs/a.txt"]
        tally = tally_of(session, ids)
        assert [row.id for row in list_documents(session, tenant="local", collection="c", ids=ids)] == ids[:1]
        assert list_documents(session, tenant="other", ids=ids) == []
        with pytest.raises(NotFound):
            text_of_document(session, ids[0], tenant="other")
        assert text_of_document(session, ids[0], tenant="local").markdown == "of local"
    assert (tally.ready, tally.total, tally.passages) == (1, 1, 1)


def test_a_new_version_that_cannot_be_read_keeps_the_old_passages(database: Database) -> None:
    document = add(database, "It was so.", collection="c")
    read_all(database)
    add(database, "broken", collection="c")
    read_all(database)
    assert states(database) == [("failed", "corrupt_document")]
    with database.transaction() as session:
        assert tally_of(session, [document]).passages == 1


@pytest.mark.parametrize("wish_s", [4e9, 1e15])
def test_a_servers_wish_to_wait_has_a_limit(database: Database, wish_s: float) -> None:
    def fetch(url: str) -> Any:
        raise Transient("busy", retry_after_s=wish_s)

    with database.transaction() as session:
        into = made_collection(session, "local", "c")
        add_document(session, NewDocument("http://example.org/a"), tenant="local", collection_id=into)
    read_all(database, fetch=fetch)
    with database.transaction() as session:
        [(waits,)] = session.connection().exec_driver_sql(
            "SELECT not_before < clock_timestamp() + interval '1 hour' AND tries = 1 FROM documents"
        )
    assert waits
    assert states(database) == [("pending", None)]


def test_a_message_that_postgres_would_refuse_is_stored_without_its_nul(database: Database) -> None:
    def fetch(url: str) -> Any:
        raise Permanent("404 a\0b", code="fetch_failed")

    with database.transaction() as session:
        into = made_collection(session, "local", "c")
        add_document(session, NewDocument("http://example.org/a"), tenant="local", collection_id=into)
    assert read_all(database, fetch=fetch).failed == 1
    assert states(database) == [("failed", "fetch_failed")]
