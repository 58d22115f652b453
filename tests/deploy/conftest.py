"""Overlays as they are, and with all the components a cluster may add."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import CLUSTER_OVERLAYS, KUBERNETES, OVERLAYS, Manifests, overlay, render

MORE_COMPONENTS = ("keda", "monitoring", "tls")
VARIANTS = (*OVERLAYS, *(f"{name}+all" for name in CLUSTER_OVERLAYS))


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the manifests, each overlay with all components before its own."""
    folder = tmp_path_factory.mktemp("extended") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    for path in folder.glob("overlays/*/kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        if "../../base" in kustomization["resources"]:
            more = [f"../../components/{name}" for name in MORE_COMPONENTS]
            kustomization["components"] = [*more, *kustomization.get("components", [])]
            path.write_text(yaml.safe_dump(kustomization))
    return folder


@cache
def _load(folder: Path) -> Manifests:
    return Manifests(render(folder))


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest, extended: Path) -> Manifests:
    """Each overlay, and each for clusters with all components."""
    name, _, more = request.param.partition("+")
    return _load(extended / "overlays" / name) if more else overlay(name)


@pytest.fixture(params=[name for name in VARIANTS if name != "podman"])
def cluster(request: pytest.FixtureRequest, extended: Path) -> Manifests:
    """Each of those a cluster runs."""
    name, _, more = request.param.partition("+")
    return _load(extended / "overlays" / name) if more else overlay(name)


@pytest.fixture(params=[f"{name}+all" for name in CLUSTER_OVERLAYS])
def complete(request: pytest.FixtureRequest, extended: Path) -> Manifests:
    """Each for clusters, with all components."""
    return _load(extended / "overlays" / request.param.partition("+")[0])
