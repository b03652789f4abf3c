"""`stoker webhooks` on real Postgres."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from models.names import batch_name
from runtime.errors import NotFound
from runtime.settings import BrokerSettings, PostgresSettings, RedisSettings, Settings
from scripts.webhooks_commands import webhooks
from store.database import Database
from tests.support.webhook_receiver import ended_batch

URL = "https://receiver.test/hook"


def invoke(postgres_url: str, *words: str) -> Result:
    settings = Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url), broker=BrokerSettings(), redis=RedisSettings()
    )
    return CliRunner().invoke(webhooks, list(words), obj=settings)


def test_deliveries_are_listed_for_their_tenant_only(database: Database, postgres_url: str) -> None:
    assert "no webhook yet" in invoke(postgres_url, "list").output
    batch_id = ended_batch(database, URL)
    other = ended_batch(database, URL, tenant="acme")
    (shown,) = json.loads(invoke(postgres_url, "list", "--json").stdout)
    assert (shown["batch"], shown["url"], shown["state"], shown["tries"]) == (batch_name(batch_id), URL, "pending", 0)
    assert shown["id"].startswith("evt_") and shown["ended_at"] is None
    (shown,) = json.loads(invoke(postgres_url, "list", batch_name(other)[:20], "--tenant", "acme", "--json").stdout)
    assert shown["batch"] == batch_name(other)
    assert "completed" in invoke(postgres_url, "list").stdout
    assert isinstance(invoke(postgres_url, "list", batch_name(other)).exception, NotFound)


def test_the_secret_stays_until_it_is_rotated(postgres_url: str) -> None:
    first, again, acme = (invoke(postgres_url, "secret", *words).stdout for words in ((), (), ("--tenant", "acme")))
    assert first == again != acme and first.startswith("whsec_")
    rotated = invoke(postgres_url, "secret", "--rotate")
    assert rotated.stdout != first and "for 24 hours" in rotated.stderr
    assert invoke(postgres_url, "secret").stdout == rotated.stdout
