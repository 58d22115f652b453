"""Rendered manifests, and questions about them.

python -m tests.deploy.manifests FOLDER writes all of them into a folder, for checkers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = tuple(sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
CLUSTER_OVERLAYS = tuple(name for name in OVERLAYS if name != "podman")
SERVICES = ("gateway", "verifier", "drafter")
MORE_COMPONENTS = ("auth", "keda", "monitoring", "tls")
"""Those a cluster may add to any overlay."""
VARIANTS = (*OVERLAYS, *(f"{name}+all" for name in CLUSTER_OVERLAYS))
"""Overlays as they are, and those for clusters with all components."""

Object = dict[str, Any]


def tool(name: str) -> str:
    """Return the path of a program that pip installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


@cache
def render(folder: Path) -> str:
    """Return what kustomize makes of a folder."""
    done = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Container:
    """A container of a Deployment's pods."""

    spec: Object
    pod: Object
    options: Mapping[str, str]
    """Environment, that of its map included; a value of the pod's own is its path."""

    @property
    def service(self) -> str:
        """The service that the container runs."""
        return str(self.spec["name"])

    def option(self, name: str) -> str:
        """Return the value of an option, or an empty string if it is not given. `--drain-grace-s` is named
        DRAIN_GRACE_S.
        """
        return self.options.get(f"SPECDEC_{self.service.upper()}_{name}", "")

    @property
    def user(self) -> tuple[int, int]:
        """User and group of the container's processes."""
        context = self.pod["securityContext"] | self.spec["securityContext"]
        return context["runAsUser"], context["runAsGroup"]

    @property
    def has_gpu(self) -> bool:
        """Whether the container gets a GPU, by a claim or as a resource."""
        resources = self.spec["resources"]
        return "claims" in resources or "nvidia.com/gpu" in resources["limits"]

    def port(self, name: str) -> int:
        """Return the port of an address option."""
        return int(self.option(name).rpartition(":")[2])


class Manifests:
    """Everything one overlay makes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[Object] = [manifest for manifest in yaml.safe_load_all(text) if manifest]

    def of(self, kind: str) -> list[Object]:
        """Return the objects of a kind."""
        return [manifest for manifest in self.objects if manifest["kind"] == kind]

    def get(self, kind: str, name: str) -> Object:
        """Return the object of a kind that has the name."""
        return next(manifest for manifest in self.of(kind) if manifest["metadata"]["name"] == name)

    def names(self, kind: str) -> set[str]:
        """Return the names of a kind's objects."""
        return {manifest["metadata"]["name"] for manifest in self.of(kind)}

    def pod_specs(self) -> Iterator[Object]:
        """Yield the pod specs of Deployments and Jobs."""
        for workload in (*self.of("Deployment"), *self.of("Job")):
            yield workload["spec"]["template"]["spec"]

    def containers(self) -> Iterator[Container]:
        """Yield the containers of services."""
        maps = {config_map["metadata"]["name"]: config_map["data"] for config_map in self.of("ConfigMap")}
        for deployment in self.of("Deployment"):
            pod = deployment["spec"]["template"]["spec"]
            for spec in pod["containers"]:
                options: dict[str, str] = {}
                for source in spec.get("envFrom", []):
                    options |= maps[source["configMapRef"]["name"]]
                options |= {
                    variable["name"]: str(variable.get("value", "")) for variable in spec.get("env", [])
                }
                yield Container(spec, pod, options)

    def matching_pods(self, selector: Mapping[str, str]) -> list[Object]:
        """Return the pod templates with these labels."""
        templates = [workload["spec"]["template"] for workload in (*self.of("Deployment"), *self.of("Job"))]
        return [
            template for template in templates if selector.items() <= template["metadata"]["labels"].items()
        ]


@cache
def overlay(name: str) -> Manifests:
    """Return an overlay as it is in the repository."""
    return Manifests(render(KUBERNETES / "overlays" / name))


def extend(folder: Path) -> None:
    """Copy the manifests into a new folder, each overlay with all components before its own."""
    shutil.copytree(KUBERNETES, folder)
    for path in folder.glob("overlays/*/kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        if "../../base" in kustomization["resources"]:
            more = [f"../../components/{name}" for name in MORE_COMPONENTS]
            kustomization["components"] = [*more, *kustomization.get("components", [])]
            path.write_text(yaml.safe_dump(kustomization))


def variant(name: str, extended: Path) -> Manifests:
    """Return one of VARIANTS; `extended` is the folder that `extend` made."""
    name, _, more = name.partition("+")
    return Manifests(render(extended / "overlays" / name)) if more else overlay(name)


def _write_all(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        extend(extended := Path(scratch) / "kubernetes")
        for name in VARIANTS:
            (target / f"{name}.yaml").write_text(variant(name, extended).text)


if __name__ == "__main__":
    _write_all(Path(sys.argv[1]))
