"""What NetworkPolicies let through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.deploy.manifests import Manifests, Object

NAMESPACE = "specdec"


@dataclass(frozen=True)
class Peer:
    """A pod as policies see it."""

    labels: Mapping[str, str]
    namespace: str = NAMESPACE


def is_allowed(manifests: Manifests, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Return whether the policies let a connection out of its source and into its target."""
    policies = manifests.of("NetworkPolicy")
    out = _passes(policies, "egress", source, target, port, protocol)
    return out and _passes(policies, "ingress", target, source, port, protocol)


def _passes(policies: list[Object], direction: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
    if pod.namespace != NAMESPACE:
        return True  # the policies here are not about it
    peers_key = "to" if direction == "egress" else "from"
    governing = [
        policy["spec"]
        for policy in policies
        if direction.capitalize() in policy["spec"]["policyTypes"]
        and _matches(policy["spec"]["podSelector"], pod.labels)
    ]
    return not governing or any(
        any((allowed["port"], allowed["protocol"]) == (port, protocol) for allowed in rule["ports"])
        and (peers_key not in rule or any(_is_peer(peer, other) for peer in rule[peers_key]))
        for spec in governing
        for rule in spec.get(direction, [])
    )


def _is_peer(peer: Mapping[str, Any], pod: Peer) -> bool:
    if "namespaceSelector" in peer:
        in_namespace = _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})
    else:
        in_namespace = pod.namespace == NAMESPACE
    return in_namespace and _matches(peer.get("podSelector", {}), pod.labels)


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "selectors by expression are not known here"
    return dict(selector.get("matchLabels", {})).items() <= labels.items()
