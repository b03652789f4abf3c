"""Keys in Postgres: what lives, what a rotation leaves, how often a use is written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from models.keys import MadeKey, is_one_of, make_key, parse_key, remake_key
from models.states import Scope
from pipeline.keys import ensure_first_key
from runtime.errors import BadInput
from store.database import Database, Session
from store.keys import (
    NewKey,
    create_key,
    list_keys,
    living_key,
    named_keys,
    revoke_key,
    rotate_key,
    set_key_expiry,
    touch_key,
)


def created(database: Database, *, tenant: str = "acme", name: str = "ci", key: MadeKey | None = None) -> MadeKey:
    """A key that is stored."""
    made = key or make_key()
    with database.transaction() as session:
        create_key(session, NewKey(made.id, tenant, name, made.digest, (Scope.READ,)))
    return made


def is_right(database: Database, key: MadeKey) -> bool:
    """Whether a key opens anything now."""
    presented = parse_key(key.text)
    assert presented is not None
    with database.transaction() as session:
        known = living_key(session, presented.id)
    return is_one_of(presented.digest, () if known is None else known.digests)


def uses(database: Database) -> tuple[int, object]:
    """How often the row of the only key was written, and its last use."""
    with database.transaction() as session:
        row = session.execute(text("SELECT xmin::text::bigint, last_used_at FROM api_keys")).one()
    return int(row[0]), row[1]


def test_a_key_has_the_form_that_is_documented_and_only_that_is_read() -> None:
    key = make_key()
    assert key.text.startswith(f"sk-{key.id}-") and len(key.text) == 3 + 12 + 1 + 43
    assert parse_key(key.text) is not None
    assert key.text not in repr(key) and key.text[16:] not in repr(parse_key(key.text))
    for wrong in ("", "sk-", key.text + "\n", key.text[:-1], key.text.upper(), key.text.replace("sk", "pk"), "sk-é"):
        assert parse_key(wrong) is None


def test_nothing_is_right_where_nothing_is_held() -> None:
    assert not is_one_of(bytes(32), ())
    assert is_one_of(b"b" * 32, (b"a" * 32, b"b" * 32))


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(revoke_key, id="revoked"),
        pytest.param(lambda session, key: set_key_expiry(session, key, timedelta(seconds=-1)), id="expired"),
    ],
)
def test_a_key_that_ended_is_as_unknown_and_gets_no_new_secret(
    database: Database, end: Callable[[Session, str], bool]
) -> None:
    key = created(database)
    assert is_right(database, key)
    with database.transaction() as session:
        assert end(session, key.id)
        assert living_key(session, key.id) is None
        assert not rotate_key(session, key.id, digest=b"", grace=timedelta(0))
    assert not is_right(database, key)


def test_a_rotated_secret_holds_until_its_grace_is_over_and_only_the_last_one(database: Database) -> None:
    first = created(database)
    second, third = remake_key(first.id), remake_key(first.id)
    with database.transaction() as session:
        assert rotate_key(session, first.id, digest=second.digest, grace=timedelta(hours=1))
    assert is_right(database, first) and is_right(database, second)
    with database.transaction() as session:
        assert list_keys(session, tenant="acme")[0].state == "rotating"
        assert rotate_key(session, first.id, digest=third.digest, grace=timedelta(hours=1))
    assert [is_right(database, key) for key in (first, second, third)] == [False, True, True]
    with database.transaction() as session:
        session.execute(text("UPDATE api_keys SET previous_until = clock_timestamp()"))
    assert [is_right(database, key) for key in (first, second, third)] == [False, False, True]
    with database.transaction() as session:
        (report,) = list_keys(session, tenant="acme")
    assert (report.state, report.previous_until) == ("living", None)


def test_a_use_is_written_once_a_minute_and_waits_for_nobody(database: Database) -> None:
    key = created(database)
    with database.transaction() as other:
        other.execute(text("SELECT FROM api_keys FOR UPDATE"))
        with database.transaction() as session:
            session.execute(text("SET LOCAL lock_timeout = '1s'"))
            touch_key(session, key.id)
    assert uses(database)[1] is None
    written = set()
    for _ in range(3):
        with database.transaction() as session:
            touch_key(session, key.id)
        written.add(uses(database))
    assert len(written) == 1
    with database.transaction() as session:
        known = living_key(session, key.id)
        assert known is not None and known.is_fresh
        session.execute(text("UPDATE api_keys SET last_used_at = last_used_at - interval '1 minute'"))
        touch_key(session, key.id)
    assert uses(database) not in written


def test_a_key_is_found_by_its_id_its_beginning_or_its_name_and_an_id_goes_first(database: Database) -> None:
    one = created(database, name="one")
    other = created(database, name=one.id, tenant="globex")
    with database.transaction() as session:
        assert [key.id for key in named_keys(session, one.id)] == [one.id]
        assert {key.id for key in named_keys(session, one.id[:11])} == {one.id}
        assert [key.id for key in named_keys(session, "one")] == [one.id]
        assert named_keys(session, "%") == []
        assert [key.id for key in list_keys(session, tenant="globex")] == [other.id]
        assert len(list_keys(session, tenant=None)) == 2
        revoke_key(session, one.id)
        assert named_keys(session, "one") == [] and named_keys(session, one.id)[0].state == "revoked"


def test_the_first_key_is_made_once_kept_and_made_anew_when_no_other_lives(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "made" / "key"
    first = ensure_first_key(database, file)
    assert first is not None and file.read_text() == first + "\n" and file.stat().st_mode & 0o777 == 0o600
    assert ensure_first_key(database, file) == first
    assert ensure_first_key(database, tmp_path / "elsewhere") is None
    presented = parse_key(first)
    assert presented is not None
    with database.transaction() as session:
        known = living_key(session, presented.id)
        assert known is not None
        assert (known.name, known.tenant, known.scopes) == ("first", "local", frozenset(Scope))
        revoke_key(session, presented.id)
    created(database, tenant="acme")
    second = ensure_first_key(database, file)
    assert second not in (None, first) and ensure_first_key(database, file) == second


def test_a_file_that_cannot_have_the_first_key_leaves_none_behind(database: Database, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="it is to hold the key"):
        ensure_first_key(database, tmp_path)
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="it is to hold the key"):
        ensure_first_key(database, tmp_path / "file" / "key")
    with database.transaction() as session:
        assert list_keys(session, tenant=None) == []
    assert ensure_first_key(database, tmp_path / "file") is not None
