"""`stoker keys` as a shell calls it, and in this process where only its words matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from models.keys import is_one_of, parse_key
from models.states import Scope
from runtime.settings import BrokerSettings, PostgresSettings, RedisSettings, Settings
from scripts.keys_commands import keys
from store.database import Database
from store.keys import LivingKey, living_key
from tests.support.processes import stoker


@pytest.fixture
def settings(postgres_url: str, redis_url: str) -> Iterator[Settings]:
    """Settings of a migrated database; no broker is asked."""
    yield Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url),
        broker=BrokerSettings(url="amqp://127.0.0.1:1"),
        redis=RedisSettings(url=redis_url),
    )


def said(settings: Settings, *words: str) -> Result:
    """What `stoker keys WORDS` did."""
    return CliRunner().invoke(keys, words, obj=settings, env={"COLUMNS": "200"})


def right(database: Database, key: str) -> LivingKey | None:
    """The key of this text, if it opens anything."""
    presented = parse_key(key)
    assert presented is not None
    with database.transaction() as session:
        known = living_key(session, presented.id)
    return known if known is not None and is_one_of(presented.digest, known.digests) else None


def listed(settings: Settings, *words: str) -> list[dict[str, Any]]:
    """What `stoker keys list --json` prints."""
    result = said(settings, "list", "--json", *words)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_a_shell_makes_a_key_finds_it_and_revokes_it_by_pasting_it_whole(
    postgres_url: str, redis_url: str, database: Database
) -> None:
    env = {
        "STOKER_POSTGRES__URL": postgres_url,
        "STOKER_BROKER__URL": "amqp://127.0.0.1:1",
        "STOKER_REDIS__URL": redis_url,
    }
    made = stoker("keys", "create", "--name", "ci", env=env)
    key = made.stdout.strip()
    known = right(database, key)
    assert made.returncode == 0 and known is not None
    assert known.tenant == "local" and known.scopes == {Scope.SUBMIT, Scope.READ}
    assert known.id in made.stderr and key not in made.stderr and "not shown again" in made.stderr
    table = stoker("keys", "list", env={**env, "COLUMNS": "160"})
    assert known.id in table.stdout and key[16:] not in table.stdout + table.stderr
    gone = stoker("keys", "revoke", key, env=env)
    assert (gone.returncode, gone.stdout) == (0, "") and right(database, key) is None


def test_a_key_has_what_was_asked_for_and_changes_one_limit_at_a_time(settings: Settings) -> None:
    words = "--tenant acme --scope read --expires 90d --requests-per-minute 60 --tokens-per-day 1000"
    made = json.loads(said(settings, "create", *words.split(), "--json").stdout)
    assert made["scopes"] == ["read"] and made["key"].startswith(f"sk-{made['id']}-")

    def terms() -> tuple[object, ...]:
        (key,) = listed(settings, "--tenant", "acme")
        return key["requests_per_minute"], key["day_tokens"], key["month_tokens"], key["expires_at"] is not None

    def money() -> tuple[object, ...]:
        (key,) = listed(settings, "--tenant", "acme")
        return key["day_money"], key["month_money"], key["currency"]

    assert terms() == (60, 1000, None, True) and money() == (None, None, "USD")
    assert said(settings, "limit", made["id"], "--tokens-per-month", "5000").exit_code == 0
    assert terms() == (60, 1000, 5000, True)
    result = said(settings, "limit", "unnamed", "--tokens-per-day", "none", "--expires", "none")
    assert ": 60 requests a minute, 5,000 tokens a month; expires never" in result.stderr
    assert terms() == (60, None, 5000, False)
    assert said(settings, "limit", made["id"], "--requests-per-minute", "none").exit_code == 0
    result = said(settings, "limit", made["id"], "--money-per-day", "2.50")
    assert "5,000 tokens a month, 2.50 USD a day; expires never" in result.stderr
    assert said(settings, "limit", made["id"], "--money-per-month", "40").exit_code == 0
    assert money() == (2.5, 40.0, "USD") and "2.50" in said(settings, "list", "--all").stdout
    assert said(settings, "limit", made["id"], "--money-per-day", "none").exit_code == 0
    assert money() == (None, 40.0, "USD")
    assert said(settings, "rename", made["id"], "night").exit_code == 0
    assert terms()[0] is None and listed(settings, "--all")[0]["name"] == "night"
    assert listed(settings) == []


def test_a_rotation_prints_the_new_key_and_the_old_one_has_its_grace(settings: Settings, database: Database) -> None:
    first = said(settings, "create", "--name", "ci").stdout.strip()
    second = said(settings, "rotate", "ci").stdout.strip()
    assert first != second and right(database, first) and right(database, second)
    third = json.loads(said(settings, "rotate", "ci", "--grace", "0", "--json").stdout)
    assert third["state"] == "living" and third["id"] == second[3:15]
    assert [right(database, key) is not None for key in (first, second, third["key"])] == [False, False, True]
    said(settings, "revoke", second[3:10])
    assert "was revoked before" in str(said(settings, "revoke", second).exception)
    assert "make a new one with `stoker keys create`" in str(said(settings, "rotate", second[3:15]).exception)


WRONG = [
    (["revoke", ""], "write 1 to 200 letters"),
    (["revoke", "%"], "`stoker keys list --all` shows them"),
    (["revoke", "twice"], "write the whole id"),
    (["limit", "once"], "name a limit"),
    (["limit", "once", "--tokens-per-day", "-1"], "1<=x<="),
    (["limit", "once", "--money-per-day", "0"], "is no amount of money"),
    (["create", "--money-per-month", "1.0000000001"], "write 5 or 0.25"),
    (["create", "--money-per-day", "nan"], "is no amount of money"),
    (["create", "--expires", "0d"], "write 90m, 24h or 7d"),
    (["create", "--expires", "99999999999d"], "to 100 years"),
    (["create", "--scope", "write"], "'submit', 'read', 'admin'"),
    (["create", "--name", "a\nb"], "is no name"),
]


def test_a_wrong_command_says_what_to_do_and_changes_nothing(settings: Settings) -> None:
    for name in ("once", "twice", "twice"):
        assert said(settings, "create", "--name", name).exit_code == 0
    before = listed(settings)
    for words, remedy in WRONG:
        result = said(settings, *words)
        assert result.exit_code != 0 and remedy in f"{result.output}{result.exception}", words
    assert listed(settings) == before
