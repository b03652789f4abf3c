"""What `stoker worker` and `stoker up` refuse before anything begins."""

from __future__ import annotations

import os
from typing import Any

import pytest
from click.testing import CliRunner

from runtime.errors import BadInput
from runtime.settings import BrokerSettings, PostgresSettings, RedisSettings, Settings, TraceSettings
from scripts.service_commands import up, worker

UNTRACEABLE = Settings.model_construct(
    postgres=PostgresSettings(url="postgresql://nobody@127.0.0.1:1/none"),
    broker=BrokerSettings(url="amqp://guest@127.0.0.1:1//"),
    redis=RedisSettings(url="redis://127.0.0.1:1/0"),
    trace=TraceSettings(to="weave"),
)


class Began(Exception):
    """It went on to Celery."""


def begin(*_: Any) -> None:
    raise Began


@pytest.mark.parametrize(
    ("arguments", "outcome"), [([], BadInput), (["--node", "documents"], Began), (["--node", "control"], Began)]
)
def test_spans_that_could_not_be_recorded_are_refused_by_the_node_that_records_them(
    arguments: list[str], outcome: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", begin)

    assert isinstance(CliRunner().invoke(worker, arguments, obj=UNTRACEABLE).exception, outcome)


def test_up_starts_nothing_whose_spans_could_not_be_recorded() -> None:
    refused = CliRunner().invoke(up, obj=UNTRACEABLE).exception

    assert isinstance(refused, BadInput) and "STOKER_TRACE__API_KEY" in str(refused)
