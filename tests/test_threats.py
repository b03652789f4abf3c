"""docs/threats.md: its ports are those that compose publishes and that services listened on; what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.settings import FlowerSettings, GatewaySettings, MetricsSettings
from tests.audit import table as audit

ROOT = Path(__file__).parents[1]
THREATS = (ROOT / "docs/threats.md").read_text()
DRY_RUN = ROOT / "benchmarks/results/compose_dry.json"
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
LOOPBACK = ("127.", "[::1]")


def ports() -> list[list[str]]:
    """The cells of the table's rows."""
    table = THREATS.partition("<!-- ports:begin -->")[2].partition("<!-- ports:end -->")[0]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()[2:]]


def test_every_published_port_stands_there_with_its_address_and_nothing_else_is_published() -> None:
    told = {(service, port, address) for service, port, address, *_ in ports() if address}
    published = set()
    for name, service in SERVICES.items():
        for one in service.get("ports", []):
            address, _, inside = re.sub(r"\$\{[^}]*}", "X", one).split(":")
            published.add((name, inside, address))
    assert told == published
    assert all(address.startswith(LOOPBACK) for *_, address in published)


def test_the_networks_of_each_service_are_the_stated_ones() -> None:
    for service, _, _, inside, *_ in ports():
        assert set(inside.split(", ")) == set(SERVICES[service].get("networks", ["stoker"])), service


def test_whatever_listens_in_compose_stands_there() -> None:
    if not DRY_RUN.exists():
        pytest.skip("`make compose-dry` has written no result")
    told = {(service, int(port)) for service, port, *_ in ports()}
    for name, service in json.loads(DRY_RUN.read_text())["services"].items():
        heard = {(name, int(port)) for address, port in service.get("ports", ()) if not address.startswith(LOOPBACK)}
        assert heard <= told, name


def test_without_compose_every_address_is_loopback() -> None:
    hosts = {GatewaySettings().host, FlowerSettings().host, MetricsSettings().host}
    assert hosts == {"127.0.0.1"} and MetricsSettings().port is None


def test_the_code_and_the_tests_that_it_names_are_there() -> None:
    named = set(re.findall(r"\b(?:[a-z_]+/)+[a-z_0-9]+\.(?:py|toml|txt|json|yml)\b", THREATS))
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_last_audit_is_the_one_that_is_told() -> None:
    assert audit.written(THREATS, json.loads(audit.RESULT.read_text())) == THREATS
