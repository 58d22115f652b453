"""Overlays as they are, and with all the components a cluster may add."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.deploy.manifests import CLUSTER_OVERLAYS, VARIANTS, Manifests, extend, variant


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the manifests in which each overlay has all components before its own."""
    extend(folder := tmp_path_factory.mktemp("extended") / "kubernetes")
    return folder


_load = cache(variant)


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest, extended: Path) -> Manifests:
    """Return each overlay in turn, and each cluster overlay with all components."""
    return _load(request.param, extended)


@pytest.fixture(params=[name for name in VARIANTS if name != "podman"])
def cluster(request: pytest.FixtureRequest, extended: Path) -> Manifests:
    """Return each variant that a cluster runs, in turn."""
    return _load(request.param, extended)


@pytest.fixture(params=[f"{name}+all" for name in CLUSTER_OVERLAYS])
def complete(request: pytest.FixtureRequest, extended: Path) -> Manifests:
    """Return each cluster overlay with all components, in turn."""
    return _load(request.param, extended)
