"""The dashboard, the alerts and docs/operations.md name what there is; Prometheus itself runs every query."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.children import spawn, stop
from runtime.metrics import CATALOGUE
from runtime.settings import TraceSettings
from runtime.trace_targets import target_of
from scripts.compose_env import PASSWORDS, add_missing, write_new
from scripts.dashboard import dashboard
from scripts.metrics_table import with_table
from tests.support.counted_metrics import ENGINE_COUNTERS, ENGINE_GAUGES, ENGINE_HISTOGRAMS
from tests.support.own_services import free_port
from tests.support.packages import located
from tests.support.processes import REPOSITORY
from tests.support.waiting import wait_until

DASHBOARD = REPOSITORY / "deploy" / "grafana" / "dashboards" / "stoker.json"
ALERTS = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"
COLLECTOR = REPOSITORY / "deploy" / "otel-collector.yaml"
COLLECTOR_PARTS = (("exporters", "otlp_http"), ("extensions", "headers_setter"))
OPERATIONS = REPOSITORY / "docs" / "operations.md"
BROKER = {"rabbitmq_disk_space_available_bytes"}
OURS = re.compile(r"\b(?:stoker|rabbitmq)_\w+|\b(?:vllm|llamacpp):\w+")
EVERYWHERE = {"instance", "job", "le"}
SCRAPES = 4


def test_the_dashboard_is_made_of_its_panels() -> None:
    assert json.loads(DASHBOARD.read_text()) == dashboard(), "run `make dashboard`"


def test_the_dashboard_has_every_metric_that_we_count() -> None:
    shown = {name for query, _ in queries() for name in OURS.findall(query)}

    assert [metric.name for metric in CATALOGUE if not shown & series_of(metric.name, metric.kind)] == []


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_query_names_metrics_and_labels_that_exist() -> None:
    labels = {
        name: {*metric.labels, *EVERYWHERE} for metric in CATALOGUE for name in series_of(metric.name, metric.kind)
    }
    known = labels.keys() | BROKER | {*ENGINE_GAUGES, *ENGINE_COUNTERS}
    known |= {name for histogram in ENGINE_HISTOGRAMS for name in series_of(histogram, "histogram")}
    expressions = [query for query, _ in queries()] + [rule["expr"] for rule in alerts()]

    assert {name for query in expressions for name in OURS.findall(query)} - known == set()
    for query in expressions:
        for name, matchers in re.findall(r"\b(stoker_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)[=!]", matchers)) <= labels[name], query


def test_every_alert_says_how_bad_it_is_and_where_its_remedy_stands() -> None:
    sections = re.findall(r"^### (Stoker\w+)$", OPERATIONS.read_text(), re.MULTILINE)
    names = [rule["alert"] for rule in alerts()]

    assert sorted(sections) == sorted(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["remedy"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_alert_is_shown_to_fire_and_to_wait() -> None:
    tests = yaml.safe_load(ALERTS.with_name("alerts_test.yml").read_text())["tests"]
    well, *others = tests
    others = [test for test in others if "," not in test["name"]]

    assert [test["name"] for test in others] == [rule["alert"] for rule in alerts()]
    assert [check["exp_samples"] for check in well["promql_expr_test"]] == [[{"labels": "{}", "value": 0}]]
    for test in others:
        quiet, fires = test["promql_expr_test"]
        assert test["name"] in quiet["expr"]
        assert quiet["exp_samples"] == []
        assert fires["exp_samples"]


def test_the_page_of_operations_has_the_metrics_of_the_catalogue() -> None:
    page = OPERATIONS.read_text()

    assert with_table(page) == page, "run `make dashboard`"


@pytest.mark.parametrize("to", ["otlp", "langsmith", "weave", "langfuse"])
def test_the_collector_passes_on_what_workers_send_to_a_service(to: str) -> None:
    url = "http://127.0.0.1:4319/v1/traces" if to == "otlp" else None
    target = target_of(TraceSettings.model_validate({"to": to, "url": url, "api_key": "a:b", "project": "us/stoker"}))
    collector = yaml.safe_load(COLLECTOR.read_text())
    exporter, setter = (collector[part][f"{name}/{to}"] for part, name in COLLECTOR_PARTS)

    assert exporter["traces_endpoint"] == f"${{env:TRACES_URL:-{target.url}}}"
    assert exporter["auth"] == {"authenticator": f"headers_setter/{to}"}
    assert [header["key"] for header in setter["headers"]] == list(target.headers)
    assert all(header["from_context"] == header["key"].lower() for header in setter["headers"])
    assert f"headers_setter/{to}" in collector["service"]["extensions"]


def test_prometheus_scrapes_every_service_of_compose_that_counts() -> None:
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    jobs = yaml.safe_load(ALERTS.with_name("prometheus.yml").read_text())["scrape_configs"]
    scraped = {name for job in jobs for found in job["dns_sd_configs"] for name in found["names"]}

    assert scraped == {"rabbitmq", "dispatch", "gateway", *(name for name in services if name.startswith("worker-"))}


def test_compose_passwords_are_made_once_and_later_ones_added(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    write_new(file)
    made = file.read_text()
    older = "".join(line for line in made.splitlines(keepends=True) if not line.startswith("GRAFANA")) + "OTHER=1"
    file.write_text(older)

    assert add_missing(file) == ["GRAFANA_PASSWORD"]
    assert file.read_text().startswith(older + "\nGRAFANA_PASSWORD=")
    assert file.stat().st_mode & 0o777 == 0o600
    assert add_missing(file) == []
    assert all(len(re.findall(rf"^{name}=\w{{64}}$", made, re.MULTILINE)) == 1 for name in PASSWORDS)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped a process which counts everything, and watches our alerts."""
    program = located("prometheus")
    if program is None:
        pytest.skip("no prometheus on this machine: python -m tests.support.packages promtool")
    folder = tmp_path_factory.mktemp("prometheus")
    counted, port = free_port(), free_port()
    config = {
        "global": {"scrape_interval": "400ms", "scrape_timeout": "400ms", "evaluation_interval": "400ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "stoker-worker", "static_configs": [{"targets": [f"127.0.0.1:{counted}"]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/rows"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    address = f"http://127.0.0.1:{port}"
    children = [
        spawn(words, env=os.environ, log=folder / "log", session=True, folder=REPOSITORY)
        for words in ([sys.executable, "-m", "tests.support.counted_metrics", str(counted)], command)
    ]
    try:
        wait_until(lambda: scrapes(address) >= SCRAPES, 60, "some scrapes")
        yield address
    finally:
        for child in children:
            stop(child, grace_s=10)


def test_every_query_of_the_dashboard_finds_something_in_a_real_prometheus(prometheus: str) -> None:
    for query, legend in queries():
        for name, value in (("$__rate_interval", "10s"), ("$__range", "10s"), ("$instance", ".*")):
            query = query.replace(name, value)  # noqa: PLW2901
        wait_until(lambda query=query: results(prometheus, query), 20, f"a result of {query}")  # type: ignore[misc]
        found = results(prometheus, query)
        wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert all(wanted <= series["metric"].keys() for series in found), f"{legend} of {query}"


def test_every_alert_is_evaluated_by_a_real_prometheus(prometheus: str) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in ask(prometheus, "rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), 30, "all rules evaluated")

    assert {rule["name"]: rule.get("lastError", "") for rule in rules()} == {rule["alert"]: "" for rule in alerts()}


def queries() -> list[tuple[str, str]]:
    """Every query of the dashboard, and its legend."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(target["expr"], target["legendFormat"]) for panel in panels for target in panel.get("targets", ())]


def alerts() -> list[dict[str, Any]]:
    """Every alert, in the file's order."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def series_of(name: str, kind: str) -> set[str]:
    """The names under which Prometheus keeps a metric."""
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}


def scrapes(address: str) -> int:
    """How often everything was scraped."""
    try:
        found = results(address, "count_over_time(stoker_spans_lost_total[1m])")
    except OSError:
        return 0
    return int(found[0]["value"][1]) if found else 0


def results(address: str, query: str) -> list[dict[str, Any]]:
    """The series that a query gives now."""
    found: list[dict[str, Any]] = ask(address, "query", query=query)["result"]
    return found


def ask(address: str, what: str, **parameters: str) -> Any:
    """What Prometheus answers; an error of a query raises."""
    with urllib.request.urlopen(f"{address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
        return json.load(answer)["data"]
