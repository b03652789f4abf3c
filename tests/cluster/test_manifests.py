"""deploy/kubernetes: valid, unprivileged, without secrets, patient with workers, and as compose has it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from api.server import GRACE_S as GATEWAY_GRACE_S
from inference.supervisor import LEFT_GRACE_S, STOP_GRACE_S
from runtime.settings import WorkerSettings, env_example, load_settings
from scripts.kubernetes_secrets import SECRET, secret
from tests.cluster.manifests import (
    FOLDER,
    NO_KUSTOMIZE,
    OVERLAYS,
    VERSIONS,
    Manifest,
    built,
    fault_of,
    kustomize,
    pods,
)
from tests.support.processes import REPOSITORY
from worker.control import END_GRACE_S
from worker.engine_hours import STOP_S
from worker.steps import BEAT_GRACE_S, DISPATCH_GRACE_S, EXPRESS_GRACE_S

pytestmark = pytest.mark.skipif(kustomize() is None, reason=NO_KUSTOMIZE)

COMPOSE: Manifest = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
ALERTS = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"
DOCUMENT = REPOSITORY / "docs" / "kubernetes.md"
# Celery's own end, after the last task: no constant of the code. All of an idle worker's end, measured, is below it.
POOL_END_S = 10.0
COMPOSE_DRY = REPOSITORY / "benchmarks" / "results" / "compose_dry.json"
OURS = ("dispatch", "flower", "gateway", "worker-control", "worker-cpu", "worker-documents", "worker-gpu")
SERVERS = ("chroma", "postgres", "rabbitmq", "redis")


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    return built(request.param)


def test_every_manifest_fits_the_schema_of_its_kind(manifests: tuple[Manifest, ...]) -> None:
    assert [fault for manifest in manifests if (fault := fault_of(manifest, VERSIONS[0]))] == []


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Deployment", lambda spec: spec["template"]["spec"].update(terminationGracePeriodSecond=1)),
        ("Deployment", lambda spec: spec["template"]["spec"]["containers"][0].pop("name")),
        ("NetworkPolicy", lambda spec: spec.update(podselector={})),
        ("CronJob", lambda spec: spec.update(schedule=5)),
        ("ScaledObject", lambda spec: spec.update(minReplicaCounts=0)),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(targetQueryValue=5)),
        ("ScaledObject", lambda spec: spec["fallback"].update(behavior="some")),
        ("TriggerAuthentication", lambda spec: spec["secretTargetRef"][0].pop("key")),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(intervall="15s")),
    ],
)
def test_a_wrong_field_is_refused(kind: str, spoil: Callable[[Manifest], object]) -> None:
    spoilt = copy.deepcopy(next(manifest for manifest in built("production") if manifest["kind"] == kind))
    assert fault_of(spoilt, VERSIONS[0]) is None

    spoil(spoilt["spec"])

    assert fault_of(spoilt, VERSIONS[0]) is not None


def test_the_alerts_are_the_spec_of_a_rule() -> None:
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "stoker"},
        "spec": yaml.safe_load(ALERTS.read_text()),
    }

    assert fault_of(rule, VERSIONS[0]) is None


def test_no_pod_may_do_more_than_the_restricted_standard(manifests: tuple[Manifest, ...]) -> None:
    for name, template in pods(manifests).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume], name
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
            assert re.search(r":[^/]+$", container["image"]), f"{name}: {container['image']} has no tag"


def test_no_secret_has_a_value_here(manifests: tuple[Manifest, ...]) -> None:
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]
    asked = set()
    for name, template in pods(manifests).items():
        for container in containers(template):
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["name"] == SECRET
                    asked.add(reference["key"])
                else:
                    assert not re.search(
                        r"PASSWORD|SECRET|TOKEN|API_KEY|(POSTGRES|BROKER|REDIS)__URL", variable["name"]
                    ), name
    made = secret()["stringData"]
    assert isinstance(made, dict)
    assert asked <= made.keys()


def test_a_made_secret_is_another_one_each_time() -> None:
    one, other = secret()["stringData"], secret()["stringData"]
    assert isinstance(one, dict)
    assert isinstance(other, dict)

    assert [name for name in one if one[name] == other[name]] == []


def test_every_setting_exists(manifests: tuple[Manifest, ...]) -> None:
    known = set(re.findall(r"^# (STOKER_\w+)=", env_example(), re.MULTILINE))
    named = {
        variable["name"]
        for template in pods(manifests).values()
        for container in containers(template)
        for variable in container.get("env", [])
    }
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            named |= manifest["data"].keys()

    assert {name for name in named if name.startswith("STOKER_")} - known == set()


def test_every_pods_settings_are_accepted(manifests: tuple[Manifest, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap"}
    made = secret()["stringData"]
    assert isinstance(made, dict)
    for name, template in pods(manifests).items():
        for container in (
            one for one in containers(template) if "stoker:" in one["image"] or "/stoker/" in one["image"]
        ):
            with monkeypatch.context() as patch:
                for source in container.get("envFrom", []):
                    for key, value in maps[source["configMapRef"]["name"]].items():
                        patch.setenv(key, value)
                for one in container.get("env", []):
                    patch.setenv(
                        one["name"], one["value"] if "value" in one else made[one["valueFrom"]["secretKeyRef"]["key"]]
                    )
                assert load_settings().metrics.port == (9464 if "envFrom" in container else None), name


def test_what_a_manifest_names_is_there(manifests: tuple[Manifest, ...]) -> None:
    """Claims and ConfigMaps of pods, pods of Services and budgets, Deployments of scalers."""
    there = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    labels = [template["metadata"]["labels"] for template in pods(manifests).values()]
    for name, template in pods(manifests).items():
        for volume in template["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there, name
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there, name
        for container in containers(template):
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            claimed = {claim["metadata"]["name"] for claim in claims_of(manifests, name)}
            assert mounted <= {volume["name"] for volume in template["spec"].get("volumes", [])} | claimed, name
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there, name
    for manifest in manifests:
        if manifest["kind"] in ("Service", "PodDisruptionBudget"):
            selector = manifest["spec"]["selector"]
            wanted = selector.get("matchLabels", selector).items()
            assert [found for found in labels if wanted <= found.items()], manifest["metadata"]["name"]
        if manifest["kind"] == "ScaledObject":
            assert ("Deployment", manifest["spec"]["scaleTargetRef"]["name"]) in there


def test_what_an_autoscaler_counts_is_not_set_by_an_apply() -> None:
    scaled = {
        manifest["spec"]["scaleTargetRef"]["name"]
        for manifest in built("production")
        if manifest["kind"] == "ScaledObject"
    }
    fixed = {
        manifest["metadata"]["name"]
        for manifest in built("production")
        if manifest["kind"] == "Deployment" and "replicas" in manifest["spec"]
    }

    assert scaled == {"worker-gpu", "worker-documents"}
    assert scaled & fixed == set()


def test_a_worker_has_the_time_that_its_end_takes(manifests: tuple[Manifest, ...]) -> None:
    for name, template in pods(manifests).items():
        if name in OURS:
            most = most_s_to_end(name, template["spec"]["containers"][0])
            assert template["spec"]["terminationGracePeriodSeconds"] >= most, name


def test_what_celery_needs_to_end_is_more_than_was_measured() -> None:
    services = json.loads(COMPOSE_DRY.read_text())["services"]
    seconds = [one["stop_s"] for name, one in services.items() if name.startswith("worker") and "stop_s" in one]

    assert seconds and max(seconds) <= POOL_END_S


def test_the_document_states_what_a_trial_asks_for() -> None:
    asked = [
        container["resources"]["requests"]
        for template in pods(built("single-node")).values()
        for container in template["spec"]["containers"]
    ]
    units = {"": 1.0, "m": 0.001, "Mi": 1 / 1024, "Gi": 1.0}

    def summed(what: str) -> float:
        parts = [re.fullmatch(r"(\d+)(\D*)", str(one[what])) for one in asked]
        return sum(int(part[1]) * units[part[2]] for part in parts if part is not None)

    assert f"the pods ask for {summed('cpu'):.1f} cores and {summed('memory'):.1f} GiB:" in DOCUMENT.read_text()


def test_the_document_states_these_times() -> None:
    templates = {**pods(built("single-node")), **pods(built("production"))}
    rows = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    stated = {
        name: (float(least), int(given))
        for names, _, seconds, given in (row for row in rows if len(row) == 4 and row[3].strip().isdigit())
        for name, least in zip(names.strip().split(", "), seconds.split(","), strict=True)
    }

    assert stated == {
        name: (
            most_s_to_end(name, templates[name]["spec"]["containers"][0]),
            templates[name]["spec"]["terminationGracePeriodSeconds"],
        )
        for name in stated
    }
    assert stated.keys() == set(OURS) - {"flower"}


def test_compose_gives_the_same_time() -> None:
    templates = {**pods(built("single-node")), **pods(built("production"))}
    for name in OURS:
        container = copy.deepcopy(templates[name]["spec"]["containers"][0])
        container.pop("lifecycle", None)  # no Service sends anything there
        container["env"] = [one for one in container["env"] if one["name"] != "STOKER_WORKER__GRACE_S"]
        given = COMPOSE["services"][name]["stop_grace_period"]
        assert float(given.removesuffix("s")) >= most_s_to_end(name, container), name


def test_no_worker_is_killed_because_a_service_is_away(manifests: tuple[Manifest, ...]) -> None:
    for name, template in pods(manifests).items():
        if name.startswith("worker") or name == "dispatch":
            (container,) = template["spec"]["containers"]
            assert not {"livenessProbe", "startupProbe"} & container.keys(), name
            command = container["readinessProbe"]["exec"]["command"]
            assert command == ["stoker", "health", name.split("-")[0]], name


def test_a_gateway_that_waits_for_the_migration_is_given_an_hour(manifests: tuple[Manifest, ...]) -> None:
    (container,) = pods(manifests)["gateway"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 3600


def test_images_and_settings_of_servers_are_those_of_compose() -> None:
    templates = pods(built("single-node"))
    for name in SERVERS:
        (container,) = templates[name]["spec"]["containers"]
        assert container["image"] == COMPOSE["services"][name]["image"], name
        ours = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
        theirs = COMPOSE["services"][name].get("environment", {})
        assert ours == {key: value for key, value in theirs.items() if "$" not in str(value)}, name
    (backup,) = pods(built("production"))["backup"]["spec"]["containers"]
    assert backup["image"] == COMPOSE["services"]["backup"]["image"] == COMPOSE["services"]["postgres"]["image"]
    assert templates["postgres"]["spec"]["containers"][0]["args"] == COMPOSE["services"]["postgres"]["command"]
    assert templates["chroma"]["spec"]["containers"][0]["args"] == COMPOSE["services"]["chroma"]["command"]
    ours = templates["redis"]["spec"]["containers"][0]["command"][-1].replace("/run/redis/", "/tmp/")
    assert ours == COMPOSE["services"]["redis"]["command"][-1].replace("$$", "$")


def test_rabbitmqs_settings_are_those_of_compose() -> None:
    compose = REPOSITORY / "deploy" / "rabbitmq.conf"
    ours = FOLDER / "services" / "rabbitmq" / "rabbitmq.conf"

    assert ours.read_text() == compose.read_text(), (
        f"cp {compose} {ours}: kustomize reads no file outside of its folder"
    )


def containers(template: Manifest) -> Iterator[Manifest]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def claims_of(manifests: tuple[Manifest, ...], name: str) -> list[Manifest]:
    owner = next(m for m in manifests if m["metadata"]["name"] == name and ("template" in str(m.get("spec"))))
    found: list[Manifest] = owner["spec"].get("volumeClaimTemplates", [])
    return found


def most_s_to_end(name: str, container: dict[str, Any]) -> float:
    """From the begin of a pod's end to the last process's, by the constants of the code."""
    environment = {one["name"]: one.get("value") for one in container.get("env", [])}
    before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if name == "gateway":
        return float(before + 2 * GATEWAY_GRACE_S)  # requests under way, then the validator
    if not name.startswith("worker"):
        return DISPATCH_GRACE_S
    grace = float(environment.get("STOKER_WORKER__GRACE_S") or WorkerSettings().grace_s)
    parts = grace + POOL_END_S + STOP_S + DISPATCH_GRACE_S
    if name == "worker-control":
        return parts + END_GRACE_S + BEAT_GRACE_S
    if environment.get("STOKER_WORKER__EXPRESS_SLOTS"):  # single requests are ended after the pool
        parts += grace + EXPRESS_GRACE_S
    return parts + (STOP_GRACE_S + LEFT_GRACE_S if "STOKER_ENGINE__KIND" in environment else 0)
