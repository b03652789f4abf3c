"""`stoker flower`'s refusals, and the password that `stoker up` makes."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from runtime.errors import BadInput
from runtime.settings import BrokerSettings, FlowerSettings, PostgresSettings, RedisSettings, Settings
from scripts.flower_command import flower, local_flower
from tests.support.own_services import free_port


def settings_in(home: Path) -> Settings:
    return Settings.model_construct(
        home=home,
        postgres=PostgresSettings(url="postgresql://nobody@127.0.0.1:1/none"),
        broker=BrokerSettings(url="redis://127.0.0.1:1/0"),
        redis=RedisSettings(url="redis://127.0.0.1:1/0"),
        flower=FlowerSettings(port=free_port()),
    )


def test_without_a_password_it_refuses_and_names_the_setting(tmp_path: Path) -> None:
    refused = CliRunner().invoke(flower, obj=settings_in(tmp_path))

    assert isinstance(refused.exception, BadInput)
    assert "STOKER_FLOWER__PASSWORD" in str(refused.exception)


def test_up_makes_a_password_once_and_keeps_it_from_others_and_from_what_it_says(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    file = tmp_path / "flower-password"
    passwords = []
    for _ in range(2):
        with local_flower(settings) as told:
            assert f"http://127.0.0.1:{settings.flower.port}/ as stoker" in told and str(file) in told
            passwords.append(file.read_text().strip())
            assert passwords[0] not in told

    assert passwords[0] == passwords[1] and len(passwords[0]) > 20
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_password_that_is_set_is_written_nowhere(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    chosen = settings.model_copy(update={"flower": settings.flower.model_copy(update={"password": "a set one"})})

    with local_flower(chosen) as told:
        assert "with the password that is set" in told
    assert not (tmp_path / "flower-password").exists()
