"""Settings: what is refused and how it is said, and the file that lists them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.errors import BadInput
from runtime.settings import Settings, WorkerSettings, env_example, environment_of, load_settings, without_secrets

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICES = {
    "STOKER_POSTGRES__URL": "postgresql://a:b@c/d",
    "STOKER_BROKER__URL": "amqp://e:f@g//",
    "STOKER_REDIS__URL": "redis://h/0",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours and no .env but the test's."""
    for name in os.environ:
        if name.startswith("STOKER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_without_a_named_service_all_are_embedded() -> None:
    settings = load_settings()
    assert settings.is_embedded
    with pytest.raises(BadInput, match="STOKER_POSTGRES__URL"):
        settings.require_postgres()


def test_all_three_services_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in SERVICES.items():
        monkeypatch.setenv(name, url)
    settings = load_settings()
    assert not settings.is_embedded
    assert [settings.require_postgres(), settings.require_broker(), settings.require_redis()] == list(SERVICES.values())


@pytest.mark.parametrize("missing", SERVICES)
def test_naming_only_some_services_is_refused_and_the_missing_one_named(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name, url in SERVICES.items():
        if name != missing:
            monkeypatch.setenv(name, url)
    with pytest.raises(BadInput, match=missing) as refused:
        load_settings()
    assert "b@c" not in str(refused.value)


def test_an_unknown_field_of_a_group_is_refused_by_its_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_WORKER__CHILDRN", "2")
    with pytest.raises(BadInput, match="STOKER_WORKER__CHILDRN"):
        load_settings()


def test_a_bad_value_is_refused_by_its_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_WORKER__CHILDREN", "none")
    with pytest.raises(BadInput, match=r"STOKER_WORKER__CHILDREN: .*integer.*\.env\.example"):
        load_settings()


def test_a_heartbeat_too_slow_for_the_lease_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_WORKER__LEASE_S", "10")
    monkeypatch.setenv("STOKER_WORKER__HEARTBEAT_S", "6")
    with pytest.raises(BadInput, match="at most half"):
        load_settings()


def test_a_dotenv_file_is_read_and_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("STOKER_WORKER__CHILDREN=7\nSTOKER_SHARD__MAX_JOBS=9\n")
    monkeypatch.setenv("STOKER_WORKER__CHILDREN", "3")
    settings = load_settings()
    assert (settings.worker.children, settings.shard.max_jobs) == (3, 9)


def test_the_listed_defaults_are_the_defaults() -> None:
    plain = load_settings()
    lines = [line.removeprefix("# ") for line in env_example().splitlines() if line.startswith("# STOKER_")]
    Path(".env").write_text("\n".join(lines))
    assert load_settings() == plain


def test_the_example_file_is_the_generated_one() -> None:
    assert (REPOSITORY / ".env.example").read_text() == env_example(), "run `make env-example`"


def test_every_setting_is_described() -> None:
    lines = env_example().splitlines()
    described = [lines[number - 1] for number, line in enumerate(lines) if line.startswith("# STOKER_")]
    assert len(described) > 30
    assert all(len(line) > len("# ") for line in described)


@pytest.mark.parametrize("window_s", ["3600", "0.25", "1234567", "604801.5"])
def test_settings_reach_a_child_process_unchanged(monkeypatch: pytest.MonkeyPatch, window_s: str) -> None:
    for name, value in {
        **SERVICES,
        "STOKER_HOME": "/srv/stoker",
        "STOKER_WORKER__IN_FLIGHT": "12",
        "STOKER_LIMITS__WINDOW_S": window_s,
        "STOKER_ENGINE__ARGS": "--a 'b c'",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_only_what_differs_goes_to_a_child_process() -> None:
    assert environment_of(Settings(worker=WorkerSettings(children=5))) == {"STOKER_WORKER__CHILDREN": "5"}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@host:5432/db",
        "redis://:secret@host:6379/0",
        "redis://:sec:ret@host/0",
        "redis://:secr/et@host/0",
        "postgresql://user:s%40cret@host/db",
    ],
)
def test_a_password_is_not_shown(url: str) -> None:
    shown = without_secrets(url)
    assert shown.endswith(url.rpartition("@")[2])
    assert not any(part in shown for part in ("secr", "cret", "ret@", "sec:"))
