"""`stoker endpoints`: what it takes, what it refuses, what a real look at a server finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from runtime.errors import BadInput, NotFound
from runtime.settings import BrokerSettings, EndpointsSettings, PostgresSettings, RedisSettings, Settings
from scripts.endpoints_commands import endpoints
from store.presence import PresenceBoard, WorkerPresence
from tests.support.scripted_endpoint import ScriptedEndpoint

KEY = "sk-proj-a-long-secret"
URL = "https://api.example.com/v1"
FREE = ("--input-price", "0", "--output-price", "0")
PRICED = ("--input-price", "0.15", "--output-price", "0.60", "--cached-price", "0.075")
NO_SERVICES = Settings.model_construct(postgres=PostgresSettings(url="postgresql://127.0.0.1:1/none"))


@pytest.fixture
def settings(postgres_url: str, redis_url: str) -> Settings:
    """Settings of a migrated database; no broker is asked."""
    return Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url),
        broker=BrokerSettings(url="amqp://127.0.0.1:1"),
        redis=RedisSettings(url=redis_url),
    )


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint(api_key=KEY, models=["big", "small"], requests_per_minute=6000) as running:
        yield running


def announce(redis_url: str, worker: str, usable: list[str]) -> None:
    """Say that this worker lives and can use these endpoints."""
    board = PresenceBoard(redis_url)
    board.announce(WorkerPresence(name=worker, children=1, models=[], endpoints=usable, engine="", healthy=True))
    board.close()


def said(settings: Settings, *words: str) -> Result:
    """What `stoker endpoints WORDS` did."""
    return CliRunner().invoke(endpoints, words, obj=settings, env={"COLUMNS": "200"})


def listed(settings: Settings, *words: str) -> list[dict[str, Any]]:
    """What `stoker endpoints WORDS --json` prints."""
    found: list[dict[str, Any]] = json.loads(said(settings, *words, "--json").stdout)
    return found


def test_an_endpoint_is_added_listed_stated_anew_and_removed(settings: Settings, redis_url: str) -> None:
    words = ("add", "cloud", URL, "--model", "large=their-large-2", "--model", "small", *PRICED)
    more = ("--key-env", "CLOUD_API_KEY", "--requests-per-minute", "500", "--concurrency", "8", "--weight", "2")
    added = said(settings, *words, *more)
    assert (added.exit_code, added.stdout) == (0, "cloud\n"), added.output
    announce(redis_url, "one", ["cloud"])
    announce(redis_url, "other", [])
    assert "1 of 2" in said(settings, "list").stdout
    [one] = listed(settings, "list")
    assert one["models"] == {"large": "their-large-2", "small": "small"}
    assert one["prices"] == {"input": "0.15", "output": "0.60", "cached": "0.075"}
    assert (one["trust"], one["key_env"], one["requests_per_minute"], one["workers"]) == (
        "external",
        "CLOUD_API_KEY",
        500,
        1,
    )
    again = said(settings, "add", "cloud", URL, "--model", "large", *FREE)
    assert isinstance(again.exception, BadInput) and "--replace" in str(again.exception)
    assert said(settings, "add", "cloud", URL, "--model", "large", "--replace", *FREE).exit_code == 0
    assert listed(settings, "list")[0]["models"] == {"large": "large"}
    assert said(settings, "remove", "cloud").exit_code == 0
    assert listed(settings, "list") == []
    gone = said(settings, "remove", "cloud")
    assert isinstance(gone.exception, NotFound) and "stoker endpoints list" in str(gone.exception)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--key", KEY), "--key: a key does not belong on a command line"),
        (("--api-key", KEY), "a key does not belong on a command line"),
        (("--key-env", KEY), "key_env"),
        (("--key-env", "gsk_0123456789abcdefghij", *FREE), "looks like a key itself"),
        (("--key-env", "A", "--key-file", "b"), "not both"),
        (("--input-price", "1"), "prices.output: an external endpoint states what it asks"),
        (("--hour-price", "3"), "hour_price is of own endpoints"),
        (("--trust", "own", *PRICED), "no price a token"),
        (("--input-price", "cheap"), "prices.input"),
        (("--input-price", "-1"), "prices.input"),
        (("--weight", "0"), "weight"),
        (("--requests-per-minute", "0"), "requests_per_minute"),
        (("--model", "m=theirs"), "--model m=theirs: m is stated twice"),
    ],
)
def test_what_an_endpoint_cannot_have_is_refused_without_repeating_it(words: tuple[str, ...], told: str) -> None:
    result = said(NO_SERVICES, "add", "cloud", URL, "--model", "m", *words)
    assert isinstance(result.exception, BadInput) and told in str(result.exception)
    assert KEY not in str(result.exception) + result.output and "gsk_" not in str(result.exception)


@pytest.mark.parametrize(
    ("name", "url"),
    [("Cloud 1", URL), ("cloud", "ftp://x"), ("cloud", f"https://u:{KEY}@x/v1"), ("cloud", f"{URL}?api_key={KEY}")],
)
def test_a_name_or_url_that_cannot_be_used_is_refused(name: str, url: str) -> None:
    result = said(NO_SERVICES, "add", name, url, "--model", "m")
    assert isinstance(result.exception, BadInput) and KEY not in str(result.exception)


def test_a_check_asks_every_alias_and_tells_what_the_headers_state(
    settings: Settings, server: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_API_KEY", KEY)
    said(
        settings,
        "add",
        "cloud",
        server.url,
        "--model",
        "large=big",
        "--model",
        "small",
        "--key-env",
        "CLOUD_API_KEY",
        *FREE,
    )
    before = server.calls().tokens
    result = said(settings, "check", "cloud")
    assert result.exit_code == 0, result.output
    assert "6,000 requests a minute" in result.stdout and KEY not in result.output
    [look] = listed(settings, "check")
    assert look["well"] and look["listed"] == ["big", "small"] and look["advice"] == []
    assert [(one["alias"], one["usage"], one["fault"]) for one in look["models"]] == [
        ("large", True, ""),
        ("small", True, ""),
    ]
    assert server.calls().tokens == before + 4, "one token of each, twice"


def test_a_check_that_fails_says_what_and_exits_with_3(
    settings: Settings, server: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_API_KEY", KEY)
    monkeypatch.setenv("WRONG_API_KEY", "sk-another-secret")
    key = ("--key-env", "CLOUD_API_KEY")
    said(settings, "add", "cloud", server.url, "--model", "small", "--model", "gone", *key, *FREE)
    said(settings, "add", "wrong", server.url, "--model", "small", "--key-env", "WRONG_API_KEY", *FREE)
    said(settings, "add", "unset", server.url, "--model", "small", "--key-env", "NOWHERE_API_KEY", *FREE)
    said(settings, "add", "down", "http://127.0.0.1:9", "--model", "small", *FREE)
    result = said(settings, "check")
    assert result.exit_code == 3
    faults = {look["name"]: " ".join(look["faults"]) for look in listed(settings, "check")}
    assert "gone: answered 404" in faults["cloud"] and "small" not in faults["cloud"].split(":")[0]
    assert "401" in faults["wrong"] and "api key" in faults["wrong"] and "another-secret" not in faults["wrong"]
    assert "NOWHERE_API_KEY, which is not set here" in faults["unset"]
    assert "127.0.0.1:9" in faults["down"]
    assert isinstance(said(settings, "check", "nobody").exception, NotFound)


def test_endpoints_of_the_file_are_listed_but_changed_there_only(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "endpoints.toml"
    file.write_text('[[endpoint]]\nname = "lab"\nurl = "http://lab:8000"\nmodels = { m = "m" }\ntrust = "own"\n')
    settings = settings.model_copy(update={"endpoints": EndpointsSettings(file=file)})
    assert [(one["name"], one["file"]) for one in listed(settings, "list")] == [("lab", str(file))]
    for words in (("remove", "lab"), ("add", "lab", URL, "--model", "m", *FREE)):
        assert str(file) in str(said(settings, *words).exception)
