"""Who may speak to whom by a set of NetworkPolicies, as a network plugin decides it, as far as ours go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tests.cluster.manifests import Manifest

NAMESPACE = "stoker"


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod by its labels and namespace, or somebody by an address."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str | None = None


def may_speak(policies: Sequence[Manifest], *, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets out of the one and into the other; a pod that no policy selects is open."""
    out = _allowed(policies, "Egress", pod=source, other=target, port=port, protocol=protocol)
    return out and _allowed(policies, "Ingress", pod=target, other=source, port=port, protocol=protocol)


def _allowed(policies: Sequence[Manifest], way: str, *, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
    if pod.address is not None or pod.namespace != NAMESPACE:
        return True
    specs = [policy["spec"] for policy in policies if way in policy["spec"]["policyTypes"]]
    chosen = [spec for spec in specs if _selects(spec["podSelector"], pod.labels)]
    if not chosen:
        return True
    side = "to" if way == "Egress" else "from"
    return any(
        any(_meets(peer, other) for peer in rule[side]) and _has_port(rule["ports"], port, protocol)
        for spec in chosen
        for rule in spec.get(way.lower(), [])
    )


def _meets(rule: Manifest, peer: Peer) -> bool:
    if block := rule.get("ipBlock"):
        if peer.address is None:
            return False
        address = ip_address(peer.address)
        inside = address in ip_network(block["cidr"])
        return inside and not any(address in ip_network(cut) for cut in block.get("except", []))
    if peer.address is not None:
        return False
    if "namespaceSelector" in rule:
        named = {"kubernetes.io/metadata.name": peer.namespace}
        return _selects(rule["namespaceSelector"], named) and _selects(rule.get("podSelector", {}), peer.labels)
    return peer.namespace == NAMESPACE and _selects(rule["podSelector"], peer.labels)


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    wanted: Iterable[tuple[str, str]] = selector.get("matchLabels", {}).items()
    expressions = selector.get("matchExpressions", [])
    assert {expression["operator"] for expression in expressions} <= {"In"}
    return all(labels.get(key) == value for key, value in wanted) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def _has_port(ports: Sequence[Manifest], port: int, protocol: str) -> bool:
    return any(
        entry["port"] <= port <= (entry.get("endPort") or entry["port"]) and entry.get("protocol", "TCP") == protocol
        for entry in ports
    )
