"""The policies of deploy/kubernetes let speak who has to, and nobody else."""

from __future__ import annotations

import itertools

import pytest

from tests.cluster.manifests import NO_KUSTOMIZE, Manifest, built, kustomize, pods
from tests.cluster.reach import Peer, may_speak

pytestmark = pytest.mark.skipif(kustomize() is None, reason=NO_KUSTOMIZE)

STOKER = "app.kubernetes.io/name"
PORTS = {"postgres": 5432, "rabbitmq": 5672, "redis": 6379, "chroma": 8000}
EVERY_PORT = (53, 443, 4369, 5432, 5555, 5672, 6379, 8000, 8080, 9464, 15672, 15692, 25672)
PUBLIC, METADATA, PRIVATE, ELSEWHERE = "93.184.215.14", "169.254.169.254", "10.0.0.9", "10.100.0.7"


def policies_of(overlay: str) -> list[Manifest]:
    return [manifest for manifest in built(overlay) if manifest["kind"] == "NetworkPolicy"]


def peers_of(overlay: str) -> dict[str, Peer]:
    return {name: Peer(template["metadata"]["labels"]) for name, template in pods(built(overlay)).items()}


def strangers_in(overlay: str) -> set[tuple[str, str, int]]:
    """(namespace, pod, port) of all that let in somebody from that other namespace."""
    namespaces = ("default", "ingress", "keda", "kube-system", "monitoring")
    return {
        (namespace, name, port)
        for namespace, (name, target), port in itertools.product(namespaces, peers_of(overlay).items(), EVERY_PORT)
        if may_speak(policies_of(overlay), source=Peer(namespace=namespace), target=target, port=port)
    }


def is_ours(peer: Peer) -> bool:
    return peer.labels[STOKER] == "stoker"


def test_pods_reach_the_servers_and_nobody_else_in_the_namespace() -> None:
    peers, policies = peers_of("production"), policies_of("production")
    spoken = {
        (one, other, port)
        for (one, source), (other, target) in itertools.product(peers.items(), peers.items())
        for port in EVERY_PORT
        if one != other and may_speak(policies, source=source, target=target, port=port)
    }

    assert spoken == {(name, "chroma", 8000) for name, peer in peers.items() if is_ours(peer)}


def test_the_trials_servers_are_asked_by_stoker_alone() -> None:
    peers, policies = peers_of("single-node"), policies_of("single-node")
    for name, target in peers.items():
        if name not in PORTS:
            continue
        asked = {
            (one, port)
            for one, source in peers.items()
            for port in EVERY_PORT
            if one != name and may_speak(policies, source=source, target=target, port=port)
        }
        assert asked == {(one, PORTS[name]) for one, peer in peers.items() if is_ours(peer)}, name
        for address in (PUBLIC, PRIVATE, METADATA):
            assert not may_speak(policies, source=target, target=Peer(address=address), port=443), name


def test_from_other_namespaces_come_only_who_must() -> None:
    peers = peers_of("production")
    scraped = {("monitoring", name, 9464) for name, peer in peers.items() if is_ours(peer)}
    assert strangers_in("production") == scraped | {("ingress", "gateway", 8080)}

    servers = {one for one in strangers_in("single-node") if one[1] in PORTS}
    assert servers == {("keda", "postgres", 5432), ("monitoring", "rabbitmq", 15692)}


def test_only_who_is_marked_gets_out_and_only_to_public_addresses() -> None:
    peers, policies = peers_of("production"), policies_of("production")
    outside = {
        (name, address)
        for name, source in peers.items()
        for address in (PUBLIC, METADATA, PRIVATE)
        if may_speak(policies, source=source, target=Peer(address=address), port=443)
    }

    assert outside == {("gateway", PUBLIC)}


def test_services_elsewhere_are_reached_by_their_ports() -> None:
    peers, policies = peers_of("production"), policies_of("production")
    for port in (5432, 5671, 6379):
        reached = {
            name
            for name, peer in peers.items()
            if may_speak(policies, source=peer, target=Peer(address=ELSEWHERE), port=port)
        }
        assert reached == {name for name, peer in peers.items() if is_ours(peer)} | {"backup"}
    assert not may_speak(policies, source=peers["gateway"], target=Peer(address=ELSEWHERE), port=22)


def test_every_pod_can_ask_for_names() -> None:
    peers, policies = peers_of("production"), policies_of("production")
    dns = Peer(namespace="kube-system")
    for protocol in ("UDP", "TCP"):
        able = [
            n for n, peer in peers.items() if may_speak(policies, source=peer, target=dns, port=53, protocol=protocol)
        ]
        assert able == list(peers)
