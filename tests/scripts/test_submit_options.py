"""Where prompts may go and what that may cost, as a command line says it, and how `stoker status` shows it."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from models.endpoints import NANOS
from models.names import batch_name
from runtime.settings import BrokerSettings, PostgresSettings, RedisSettings, Settings
from scripts.batch_commands import status
from scripts.submit_options import How, with_how
from store.database import Database
from store.money import open_batch_money, set_key_money
from tests.store.test_money import add_key
from tests.support.batches import chats, execute, store_batch

SETTINGS = Settings(_env_file=None)


@click.command()
@with_how
def echo(how: How) -> None:
    made = how.options(SETTINGS, common={}, validate_answers=False)
    click.echo(f"{made.trust.value} {how.wishes().budget_nanos} {how.wishes(spent_nanos=2 * NANOS).budget_nanos}")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("", "own None None"),
        ("--trust external", "external None None"),
        ("--trust external --budget-money 5.00", "external 5000000000 3000000000"),
        ("--trust external --budget-money 0.000000001", "external 1 1"),
        ("--budget-money 5", "would never be used, as prompts stay on own endpoints: add --trust external"),
        ("--trust own --budget-money 5", "would never be used"),
        ("--trust all", "'own', 'external'"),
        ("--trust external --budget-money 0", "is no amount of money"),
        ("--trust external --budget-money -1", "is no amount of money"),
        ("--trust external --budget-money 0.0000000001", "no more than 9 decimal places"),
        ("--trust external --budget-money 5USD", "write 5 or 0.25"),
        ("--trust external --budget-money inf", "is no amount of money"),
    ],
)
def test_money_is_for_prompts_that_may_leave_and_has_nine_decimals(words: str, shown: str) -> None:
    assert shown in " ".join(CliRunner(env={"COLUMNS": "400"}).invoke(echo, words.split()).output.split())


def test_status_shows_what_is_spent_of_money(
    postgres_url: str, redis_url: str, database: Database, tmp_path: Path
) -> None:
    settings = Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url),
        broker=BrokerSettings(url="amqp://127.0.0.1:1"),
        redis=RedisSettings(url=redis_url),
    )
    key_id, batch_id = add_key(database, day=None, month=None), store_batch(database, tmp_path, chats(2))
    execute(database, "UPDATE batches SET key_id = :key WHERE id = :id", key=key_id, id=batch_id)
    with database.transaction() as session:
        open_batch_money(session, batch_id, 5 * NANOS)
        set_key_money(session, key_id, day_money=NANOS // 2, month_money=None)
    execute(database, "UPDATE money_budgets SET spent = 1500000, reserved = 2000000000")
    shown = CliRunner().invoke(status, [batch_name(batch_id)], obj=settings)
    assert "budget: 0.00150 USD of 5.00 USD spent, 2.00 USD reserved" in shown.stderr
    assert f"day budget of key {key_id}: 0.00 USD of 0.500 USD spent" in shown.stderr
    told = json.loads(CliRunner().invoke(status, [batch_name(batch_id), "--json"], obj=settings).stdout)
    day, own = told["money_budgets"]
    assert (day["period"], day["cap"], day["spent"], day["currency"]) == ("day", 0.5, 0.0, "USD")
    assert (own["period"], own["cap"], own["spent"], own["reserved"]) == ("batch", 5.0, 0.0015, 2.0)
