"""The directory of endpoints: rows and a file, names once, keys found where they are and shown nowhere."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from models.endpoints import EndpointSpec
from pipeline.endpoints import endpoints_in, key_of, known_endpoints, read_endpoint, register_endpoint
from runtime.errors import BadInput
from runtime.settings import EndpointsSettings, PostgresSettings, Settings
from store.database import Database
from store.endpoints import add_endpoint
from worker.announced import Announcement, require_endpoints

SECRET = "sk-a-long-secret"
REPOSITORY = Path(__file__).resolve().parents[2]


def spec(name: str = "cloud", **fields: object) -> EndpointSpec:
    return EndpointSpec.model_validate({"name": name, "url": "http://x:1", "models": {"m": "m"}, **fields})


def written(folder: Path, text: str) -> Path:
    file = folder / "endpoints.toml"
    file.write_text(text)
    return file


def settings_with(file: Path | None, url: str = "") -> Settings:
    return Settings.model_construct(postgres=PostgresSettings(url=url), endpoints=EndpointsSettings(file=file))


def add(database: Database, *specs: EndpointSpec) -> None:
    with database.transaction() as session:
        for one in specs:
            add_endpoint(session, one.name, one.model_dump(mode="json"))


LAB = '[[endpoint]]\nname = "lab"\nurl = "http://lab:8000/v1"\ntrust = "own"\n[endpoint.models]\nm = "theirs/m"\n'


def test_rows_and_the_file_are_one_directory_where_each_name_stands_once(database: Database, tmp_path: Path) -> None:
    add(database, spec("zoo"), spec("cloud"))
    file = written(tmp_path, LAB)
    found = known_endpoints(database, settings_with(file))
    assert [(one.name, one.models) for one in found] == [
        ("cloud", {"m": "m"}),
        ("lab", {"m": "theirs/m"}),
        ("zoo", {"m": "m"}),
    ]
    assert known_endpoints(database, settings_with(None))[0] == spec("cloud"), "as it was added"
    with pytest.raises(BadInput, match=rf"lab is stated twice, in {file};"):
        known_endpoints(database, settings_with(written(tmp_path, LAB + LAB)))
    add(database, spec("lab"))
    with pytest.raises(BadInput, match=rf"lab is stated twice, in `stoker endpoints list` and {file}"):
        known_endpoints(database, settings_with(written(tmp_path, LAB)))


def test_the_example_file_can_be_used() -> None:
    assert len(endpoints_in(REPOSITORY / "examples" / "endpoints.toml")) >= 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("endpoint = 3", "endpoint is not expected"),
        ("[[endpoints]]\nname = 'a'", "endpoints is not expected"),
        ("name =", "is no TOML"),
        (
            LAB + f"\n[[endpoint]]\nname = 'b'\nurl = 'http://b'\nmodels = {{ m = 'm' }}\napi_key = '{SECRET}'",
            "b: api_key",
        ),
        (LAB.replace("lab:8000", f"user:{SECRET}@lab"), "lab: url: the endpoint's URL holds a user or password"),
        (LAB.replace('name = "lab"\n', ""), "endpoint 1: name: Field required"),
        (LAB.replace("m = ", "'' = "), "models"),
        ("[[endpoint]]\nname = 'a'\nurl = 'http://a'\nmodels = { m = 'm' }\ntrust = 'private'", "a: trust"),
    ],
)
def test_a_file_that_cannot_be_used_names_the_table_and_the_field(tmp_path: Path, text: str, told: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(BadInput) as error:
        endpoints_in(file)
    assert str(error.value).startswith(str(file)) and told in str(error.value) and SECRET not in str(error.value)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="STOKER_ENDPOINTS__FILE"):
        endpoints_in(tmp_path / "none.toml")


def test_a_key_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", f" {SECRET}\n")
    assert key_of(spec(key_env="CLOUD_KEY")) == SECRET
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    file.chmod(0o600)
    with capture_logs() as logs:
        assert key_of(spec(key_file=file)) == SECRET
    assert not logs and key_of(spec()) is None
    (tmp_path / "endpoints.toml").write_text(LAB.replace("[endpoint.models]", 'key_file = "key"\n[endpoint.models]'))
    [beside] = endpoints_in(tmp_path / "endpoints.toml")
    assert key_of(beside.spec) == SECRET, "a relative path is beside the file"


def test_a_key_file_that_others_may_read_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(SECRET)
    file.chmod(0o644)
    with capture_logs() as logs:
        assert key_of(spec(key_file=file)) == SECRET
    assert [one["event"] for one in logs] == ["key_file_open_to_all"] and SECRET not in repr(logs)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"two\nlines of " + SECRET.encode(), b"x" * 20_000])
def test_a_file_without_a_fit_key_is_named_but_not_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(BadInput, match=str(file)) as error:
        key_of(spec(key_file=file))
    assert SECRET not in str(error.value)
    with pytest.raises(BadInput, match="cannot be read here"):
        key_of(spec(key_file=tmp_path / "none"))
    with pytest.raises(BadInput, match="NOWHERE_KEY, which is not set here"):
        key_of(spec(key_env="NOWHERE_KEY"))


@given(st.dictionaries(st.sampled_from(["name", "url", "models", "key_env", "prices", "weight", "x"]), st.text()))
def test_whatever_is_stated_is_never_repeated(fields: dict[str, str]) -> None:
    with pytest.raises(BadInput) as error:
        read_endpoint({"models": 1, **{name: SECRET + value for name, value in fields.items()}}, place="here")
    assert SECRET not in str(error.value)


def test_a_row_of_an_endpoint_has_no_secret_and_another_price_is_another_row(database: Database) -> None:
    priced: dict[str, Any] = {"prices": {"input": "1", "output": "2"}, "key_env": "CLOUD_KEY"}
    with database.transaction() as session:
        first = register_endpoint(session, spec(**priced), currency="USD")
        limited = register_endpoint(session, spec(**priced, tokens_per_minute=10, weight=3), currency="USD")
        dearer = register_endpoint(session, spec(prices={"input": "3", "output": "2"}), currency="USD")
    assert first == limited != dearer


def test_a_worker_announces_what_it_has_keys_for(
    database: Database, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_KEY", SECRET)
    settings = settings_with(None, postgres_url)
    with pytest.raises(BadInput, match="no registered endpoint that it can use"):
        require_endpoints(settings)
    add(
        database,
        spec("box", trust="own", models={"mine": "m"}),
        spec("cloud", key_env="CLOUD_KEY", models={"theirs": "m", "mine": "m"}),
        spec("elsewhere", key_env="NOWHERE_KEY", models={"other": "m"}),
    )
    require_endpoints(settings)
    clock = count(0.0, 20.0)
    announcement = Announcement(settings, own_models=["engine-model"], clock=lambda: next(clock))
    serves = announcement.current()
    assert serves.models == ["engine-model", "mine"] and serves.external_models == ["mine", "theirs"]
    assert serves.endpoints == ["box", "cloud"]
    add(database, spec("late", trust="own", models={"new": "m", "mine": "m"}))
    seen = [announcement.current().models for _ in range(6)]
    assert seen[0] == ["engine-model", "mine"] and seen[-1] == ["engine-model", "mine", "new"]
    assert any("late" in announcement.current().endpoints for _ in range(2))
