"""What other people's checkers say: kubernetes-validate, yamllint, hadolint."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT, Manifests, tool

KUBERNETES_VERSIONS = ("1.32", "1.34", "1.37")
WITHOUT_SCHEMA = {"Certificate", "Issuer", "PodMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of operators, which no version of Kubernetes brings; tests of their own look at them."""
NOT_YET = {"1.32": {"ResourceClaimTemplate"}}
"""Kinds that came later: resource.k8s.io/v1 is of 1.34."""


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(manifests: Manifests, version: str, tmp_path: Path) -> None:
    path = tmp_path / "manifests.yaml"
    path.write_text(manifests.text)
    command = [tool("kubernetes-validate"), "--strict", "-k", version, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    unknown = set(re.findall(r"Couldn't find schema for kind (\w+)", output))
    kinds = {manifest["kind"] for manifest in manifests.objects}
    # Exactly those: a misspelt apiVersion has no schema, either.
    assert unknown == kinds & (WITHOUT_SCHEMA | NOT_YET.get(version, set()))
    num_seen = output.count("passed for resource") + output.count("Couldn't find schema")
    assert num_seen == len(manifests.objects)


def test_yaml_is_tidy() -> None:
    command = [tool("yamllint"), "--strict", "--config-file", str(ROOT / ".yamllint.yaml"), str(DEPLOY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_tidy() -> None:
    command = [tool("hadolint"), str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
