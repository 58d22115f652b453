"""The deployment files: rendered, valid for each version of Kubernetes, and true of what they start."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from drafter_service.cli import main as drafter
from gateway.cli import main as gateway
from verifier_service.cli import main as verifier

DEPLOY = Path(__file__).parents[2] / "deploy"
BIN = Path(sys.executable).parent
COMMANDS: dict[str, click.Command] = {"gateway": gateway, "verifier": verifier, "drafter": drafter}
PORTS = {"gateway": 50050, "verifier": 50051, "drafter": 50052}
# DRA is in v1 since 1.34.
VERSIONS = {
    "cpu": ("1.32", "1.34", "1.37"),
    "split": ("1.32", "1.34", "1.37"),
    "h100-colocated": ("1.34", "1.37"),
}
CASES = [(overlay, version) for overlay, versions in VERSIONS.items() for version in versions]

Object = dict[str, Any]


def run(*command: str | Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def rendered(overlay: str) -> str:
    """The manifests of an overlay."""
    return run(BIN / "kubectl", "kustomize", DEPLOY / "kubernetes" / "overlays" / overlay)


def objects(overlay: str, kind: str) -> list[Object]:
    """Its objects of a kind."""
    return [one for one in yaml.safe_load_all(rendered(overlay)) if one["kind"] == kind]


def containers(overlay: str) -> list[tuple[Object, Object]]:
    """Pod and container specs."""
    pods = [one["spec"]["template"]["spec"] for one in objects(overlay, "Deployment")]
    return [(pod, container) for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize(("overlay", "version"), CASES)
def test_every_overlay_is_valid(overlay: str, version: str, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(rendered(overlay))
    run(BIN / "kubernetes-validate", "--strict", "-k", version, path)


def test_files_are_tidy() -> None:
    run(BIN / "hadolint", DEPLOY / "Dockerfile")
    run(BIN / "yamllint", "--strict", "-c", DEPLOY / "yamllint.yaml", DEPLOY)


@pytest.mark.parametrize("overlay", VERSIONS)
def test_settings_are_options_of_their_service_and_are_taken(
    overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in objects(overlay, "ConfigMap"):
        name = config["metadata"]["name"].partition("-")[0]
        command = COMMANDS[name]
        known = {f"SPECDEC_{name}_{option.name}".upper() for option in command.params}
        assert config["data"].keys() <= known
        for key, value in config["data"].items():
            monkeypatch.setenv(key, value)
        taken = command.make_context(name, []).params
        assert taken["listen"] == f"0.0.0.0:{PORTS[name]}"
        assert taken["metrics_listen"] == "0.0.0.0:9464"


@pytest.mark.parametrize("overlay", VERSIONS)
def test_ports_probes_and_grace_are_those_of_the_service(overlay: str) -> None:
    settings = {config["metadata"]["name"]: config["data"] for config in objects(overlay, "ConfigMap")}
    for pod, container in containers(overlay):
        name = container["name"]
        (source,) = container["envFrom"]
        grace_s = float(settings[source["configMapRef"]["name"]][f"SPECDEC_{name.upper()}_DRAIN_GRACE_S"])
        pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > grace_s + pause_s
        assert PORTS[name] in [port["containerPort"] for port in container["ports"]]
        service = f"specdec.v1.{name.capitalize()}Service"
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["grpc"] == {"port": PORTS[name], "service": service}
        assert container["livenessProbe"]["grpc"]["port"] == PORTS[name]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("overlay", VERSIONS)
def test_names_lead_to_pods_that_listen_and_traffic_is_let_through(overlay: str) -> None:
    pods = {one["metadata"]["name"]: one["spec"]["template"] for one in objects(overlay, "Deployment")}
    policies = {one["metadata"]["name"]: one["spec"] for one in objects(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for service in objects(overlay, "Service"):
        selected = [
            pod
            for pod in pods.values()
            if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        ]
        assert len(selected) == 1, service["metadata"]["name"]
        (port,) = service["spec"]["ports"]
        listening = [p["containerPort"] for c in selected[0]["spec"]["containers"] for p in c["ports"]]
        assert port["targetPort"] in listening
        component = selected[0]["metadata"]["labels"]["app.kubernetes.io/component"]
        allowed = [p["port"] for rule in policies[f"to-{component}"]["ingress"] for p in rule["ports"]]
        assert port["targetPort"] in allowed
        assert 9464 in allowed
    leaving = [p["port"] for rule in policies["from-gateway"]["egress"] for p in rule["ports"]]
    assert leaving == [50051, 50052]


def test_colocated_services_share_one_gpu_and_one_memory() -> None:
    (pod,) = [pod for pod, container in containers("h100-colocated") if container["name"] == "drafter"]
    assert pod["shareProcessNamespace"]
    assert len(pod["resourceClaims"]) == 1
    claims = [one["resources"]["claims"] for one in pod["containers"]]
    assert claims == [[{"name": "gpu"}]] * 2
    mounts = [
        {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]} for one in pod["containers"]
    ]
    assert mounts[0]["state"] == mounts[1]["state"] == "/run/specdec"


def test_each_service_scales_by_its_own_load() -> None:
    text = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    for scaler in objects("cpu", "HorizontalPodAutoscaler"):
        name = scaler["spec"]["scaleTargetRef"]["name"]
        for metric in scaler["spec"]["metrics"]:
            used = metric["pods"]["metric"]["name"]
            assert used.startswith(f"specdec_{name}_")
            assert f"`{used.replace('specdec_' + name + '_', f'specdec.{name}.')}`" in text
