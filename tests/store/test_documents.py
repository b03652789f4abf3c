"""Documents' rows: added once, claimed under a fence, recovered, ended; and what their reading does with errors."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.errors import Permanent, Transient
from store.database import Database
from store.documents import (
    CRASHES_TO_POISON,
    Added,
    DocumentClaim,
    NewDocument,
    ReadDocument,
    add_document,
    claim_document,
    end_document,
    fail_document,
    hold_document,
    list_documents,
    made_collection,
    recover_documents,
    remove_documents,
    tally_of,
    waiting_documents,
)
from tests.support.batches import execute
from tests.support.cooking import add, read_all

LEASE_S = 30.0


def added(database: Database, digest: str | None, **more: Any) -> Added:
    """What adding these bytes under one name does."""
    content = None if digest is None else digest.encode()
    with database.transaction() as session:
        into = made_collection(session, "local", "c")
        document = NewDocument("/docs/one", content, digest)
        return add_document(session, document, tenant="local", collection_id=into, **more)[1]


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
        assert waiting_documents(session, limit=5, with_index=False) == 0
    execute(database, "ALTER TABLE document_bytes ADD CHECK (false)")  # it holds only if no row is left


def test_tenants_have_documents_of_one_name_each(database: Database) -> None:
    ids = [add(database, f"of {tenant}", collection="c", tenant=tenant) for tenant in ("local", "other")]
    read_all(database)
    with database.transaction() as session:
        into = made_collection(session, "other", "c")
        assert remove_documents(session, ["/docs/a.txt"], tenant="local", collection_id=into) == []
        assert remove_documents(session, ["/docs/a.txt"], tenant="other", collection_id=into) == ["/docs/a.txt"]
        tally = tally_of(session, ids)
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
